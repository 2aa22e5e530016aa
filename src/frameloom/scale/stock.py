"""What is used of `torch.distributed` beyond its public names, in one place, so that a new version breaks one file."""

from typing import Any

from frameloom.errors import InputError

_NAMES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}


def schedule_class(name: str) -> Any:
    """The class of `torch.distributed.pipelining` that runs a schedule of `frameloom.scale.schedule`.

    The order that torch's own tables give for 1F1B is wrong for the last rank (it starts at the second micro-batch);
    the executed one is right. That is why schedules are made here and only run there.
    """
    from torch.distributed.pipelining.schedules import get_schedule_class

    if name not in _NAMES:
        raise InputError(f"schedule={name}: there are {', '.join(_NAMES)}")
    return get_schedule_class(_NAMES[name])


def pipeline_stage(module: Any, index: int, stages: int, device: Any, group: Any) -> Any:
    """A `PipelineStage` around a `frameloom.scale.gpipe.Stage`.

    Before its first step torch runs every stage once with made-up numbers, to learn shapes; the stage is told so.
    """
    from torch.distributed.pipelining import PipelineStage

    class Told(PipelineStage):
        def _compute_outputs(self, *args, module, **given):
            with module.trial():
                return super()._compute_outputs(*args, module=module, **given)

    return Told(module, index, stages, device, group=group)

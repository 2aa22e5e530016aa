"""`frameloom`: the entry point. Importing it imports Typer and nothing heavier; verbs import their engines when run."""

import sys

import typer

from frameloom.cli import batch, edit, make, models, quantize, scale, serve, toolbox, verbs

app = typer.Typer(
    name="frameloom",
    help="Published methods for video behind one command line: measure, repair, store and make video.",
    epilog="--debug after any command shows the traceback of an error. frameloom methods lists what is there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (make, verbs, edit, models, scale, quantize, serve, batch, toolbox):
    group.register(app)


def main() -> None:
    """Run a command; mistakes that a user can mend become one line and exit status 2."""
    from frameloom.errors import InputError, Interrupted

    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except (InputError, Interrupted) as error:
        if debug:
            raise
        print(f"frameloom: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 130)
    except KeyboardInterrupt:
        print("frameloom: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""The selective scan of state space models (S6), without a custom kernel.

For every channel d, state n and token l

    h[l] = exp(dt[l] A) h[l-1] + dt[l] B[l] x[l],    y[l] = C[l] . h[l] + D x[l]

with A < 0, so that every factor exp(dt A) lies in (0, 1]. Only these factors and products of neighbouring
ones are formed, never their inverses: a decay that underflows is a forgotten past, nothing can overflow.

The sequence is cut into chunks whose states fit a cache; the last state of a chunk is carried into the next.
Backward keeps the carried states alone and computes each chunk again, so that memory grows with the tokens
and not with tokens times states.

Source: A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# States of one chunk, all channels together: about the size of a core's cache, or enough to fill a GPU.
CHUNK_STATES = {"cpu": 2**18, "cuda": 2**24}


def scan_macs(tokens: int, channels: int, states: int) -> int:
    """Multiply-accumulates of one selective scan: dt A, dt x, (dt x) B, a h + u, C h and D x."""
    return tokens * channels * (4 * states + 2)


def attention_macs(tokens: int, channels: int) -> int:
    """Multiply-accumulates of full attention over the same tokens: scores, and their product with values."""
    return 2 * tokens * tokens * channels


def recurrence(
    decay: Float[Tensor, "l *rest"],
    drive: Float[Tensor, "l *rest"],
    state: Float[Tensor, "*rest"],
    parallel: bool,
) -> Float[Tensor, "l *rest"]:
    """All states of h[l] = decay[l] h[l-1] + drive[l] with h[-1] = `state`.

    `parallel` doubles the span of each state log2(l) times (Kogge-Stone): more work and few launches, right
    for a GPU. Otherwise token after token, in place in `drive`: the least work, right for a CPU.
    """
    if not parallel:
        for step in range(len(drive)):
            state = torch.addcmul(drive[step], decay[step], state, out=drive[step])
        return drive
    drive = torch.cat([torch.addcmul(drive[:1], decay[:1], state), drive[1:]])
    span = 1
    while span < len(drive):
        drive = torch.cat([drive[:span], torch.addcmul(drive[span:], decay[span:], drive[:-span])])
        decay = torch.cat([decay[:span], decay[span:] * decay[:-span]])
        span *= 2
    return drive


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, chunk, parallel):
        state = x.new_zeros(x.shape[1:-1] + A.shape[-2:])
        y = torch.empty_like(x)
        carried = []
        for part in _chunks(len(x), chunk):
            carried.append(state)
            states = recurrence(*_terms(x[part], dt[part], A, B[part]), state, parallel)
            y[part] = (C[part].unsqueeze(-2) @ states).squeeze(-2)
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, *carried)
        ctx.chunk, ctx.parallel = chunk, parallel
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, dt, A, B, C, *carried = ctx.saved_tensors
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_B, grad_C, grad_A = torch.empty_like(B), torch.empty_like(C), torch.zeros_like(A)
        grad_state = torch.zeros_like(carried[0])  # of the state that leaves the chunk
        for part, state in reversed(list(zip(_chunks(len(x), ctx.chunk), carried, strict=True))):
            decay, drive = _terms(x[part], dt[part], A, B[part])
            states = recurrence(decay, drive, state, ctx.parallel)
            grad_C[part] = (states @ grad_y[part].unsqueeze(-1)).squeeze(-1)

            # The same recurrence from the end: g[l] = C[l] grad_y[l] + decay[l+1] g[l+1].
            source = (C[part].unsqueeze(-1) * grad_y[part].unsqueeze(-2)).flip(0)
            shifted = torch.cat([torch.ones_like(decay[:1]), decay.flip(0)[:-1]])
            grad_states = recurrence(shifted, source, grad_state, ctx.parallel).flip(0)
            grad_state = decay[0] * grad_states[0]

            grad_B[part] = (grad_states @ (dt[part] * x[part]).unsqueeze(-1)).squeeze(-1)
            grad_input = (B[part].unsqueeze(-2) @ grad_states).squeeze(-2)
            grad_exponent = grad_states.mul_(decay)
            grad_exponent *= torch.cat([state.unsqueeze(0), states[:-1]])
            grad_x[part] = grad_input * dt[part]
            grad_dt[part] = grad_input * x[part] + (grad_exponent * A).sum(-2)
            grad_A += grad_exponent.mul_(dt[part].unsqueeze(-2)).sum((0, 1))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, None, None


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _terms(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return (dt.unsqueeze(-2) * A).exp_(), (dt * x).unsqueeze(-2) * B.unsqueeze(-1)


def selective_scan(
    x: Float[Tensor, "l b k d"],
    dt: Float[Tensor, "l b k d"],
    A: Float[Tensor, "k n d"],
    B: Float[Tensor, "l b k n"],
    C: Float[Tensor, "l b k n"],
    D: Float[Tensor, "k d"],
    chunk: int | None = None,
    parallel: bool | None = None,
) -> Float[Tensor, "l b k d"]:
    """Scan l tokens of k independent groups of d channels with n states each, in float32 (float64 stays).

    Tokens come first, so that one step of all sequences is one stretch of memory. dt >= 0 and A < 0. `chunk`
    (tokens) and `parallel` (see `recurrence`) follow the device unless given. Differentiable once.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    kind = x.device.type
    states = A.numel() * x.shape[1]
    chunk = chunk or max(4, min(len(x), CHUNK_STATES.get(kind, 2**24) // max(states, 1)))
    parallel = kind != "cpu" if parallel is None else parallel
    with torch.autocast(kind, enabled=False):
        x, dt, A, B, C, D = (value.to(dtype) for value in (x, dt, A, B, C, D))
        return _SelectiveScan.apply(x, dt, A, B, C, chunk, parallel) + D * x

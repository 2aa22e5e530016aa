"""Warp fields of a few nodes: bilinear between them, and solved for so that what is seen accelerates least."""

import numpy as np
from jaxtyping import Float
from scipy.sparse import coo_matrix, diags, eye, kron
from scipy.sparse.linalg import splu


def node_weights(points: Float[np.ndarray, "n 2"], size: tuple[int, int], grid: int):
    """The four nodes of a grid over a picture of `size` around each point, and their bilinear shares, `(n, 4)`."""
    at = np.clip(points / (size[1] - 1, size[0] - 1), 0, 1) * (grid - 1)
    low = np.minimum(at.astype(int), grid - 2)
    part = at - low
    corners, shares = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            corners.append((low[:, 1] + dy) * grid + low[:, 0] + dx)
            shares.append(np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1]))
    return np.stack(corners, 1), np.stack(shares, 1)


def solve_fields(
    tracks: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    size: tuple[int, int],
    *,
    grid: int,
    spread: float,
    hold: float,
    rounds: int = 2,
) -> tuple[Float[np.ndarray, "t g2 2"], list[float]]:
    """The warp fields (displacements of the nodes, pixels) under which what is seen accelerates least.

    `tracks`: for each frame but the first and the last, where points are in the frame before, in it and in the frame
    after, `(n, 2)` each, after the coarse stage, and how far each is believed, `(n,)`. `grid`: nodes a side; `spread`
    and `hold` keep a field even and small. Fields of the first and the last frame are zero. Every further round solves
    again at the places that the one before led to, with less belief in points that still accelerate: they move by
    themselves. Also returns the mean change of every round in pixels.
    """
    frames, nodes = len(tracks) + 2, grid**2
    steps = diags([-1.0, 1.0], [0, 1], shape=(grid - 1, grid))
    along = steps.T @ steps
    even = kron(along, eye(grid)) + kron(eye(grid), along)
    keep = kron(eye(frames), spread * even / grid + hold / nodes * eye(nodes)).tocsr()
    inner = slice(nodes, (frames - 1) * nodes)
    field, changes = np.zeros((frames, nodes, 2)), []
    for _ in range(rounds):
        rows, columns, values, target, weight = [], [], [], [], []
        count = 0
        for t, (before, here, after, trust) in enumerate(tracks, 1):
            own = np.arange(count, count + len(here))
            still = before - 2 * here + after
            bent = still.copy()
            for frame, places, factor in ((t - 1, before, 1), (t, here, -2), (t + 1, after, 1)):
                corners, shares = node_weights(places, size, grid)
                rows.append(np.repeat(own, 4))
                columns.append((frame * nodes + corners).ravel())
                values.append((factor * shares).ravel())
                bent += factor * (shares[..., None] * field[frame][corners]).sum(1)
            target.append(-still)
            weight.append(trust / (1 + np.square(bent).sum(1)) ** 2 / max(trust.sum(), len(trust) / 20))
            count += len(here)
        rows, columns, values = np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
        system = coo_matrix((values, (rows, columns)), shape=(count, frames * nodes)).tocsr()
        weighted = diags(np.concatenate(weight)) @ system
        normal = (system.T @ weighted + keep)[inner, inner].tocsc()
        answer = splu(normal).solve((weighted.T @ np.concatenate(target))[inner])
        after = np.zeros_like(field)
        after[1:-1] = answer.reshape(frames - 2, nodes, 2)
        changes.append(float(np.linalg.norm(after - field, axis=-1).mean()))
        field = after
    return field, changes

"""The world's labels against each other: every one is checked through a path that does not share its code."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import frameloom.world
from frameloom.errors import InputError
from frameloom.world import KINDS, OUTPUTS, World, WorldDataset

SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
H, W = 48, 64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixel_centres(height=H, width=W):
    return torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")


def sample(pictures, x, y, mode="bicubic"):
    """Pictures (n, c, h, w) at pixel coordinates (n, h, w)."""
    height, width = pictures.shape[-2:]
    grid = torch.stack([x / width * 2 - 1, y / height * 2 - 1], -1)
    return F.grid_sample(pictures, grid, mode=mode, padding_mode="border", align_corners=False)


def near_edges(pictures, reach=2, step=0.15):
    """Where a channel spans more than `step` within `reach` pixels: resampling decides the error there."""
    size = 2 * reach + 1
    high, low = F.max_pool2d(pictures, size, 1, reach), -F.max_pool2d(-pictures, size, 1, reach)
    return (high - low).amax(1, keepdim=True) > step


def grown(mask, reach=2):
    return F.max_pool2d(mask.float(), 2 * reach + 1, 1, reach) > 0


def flat(value):
    return value.flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seed=SEEDS)
def test_flow_warps_each_frame_onto_its_neighbour(kind, seed):
    # Pixels are averages of 4x4 samples and bicubic resampling blurs steep places, so those are left out; so
    # are pixels that share their area with a hidden point or with another body. Shade is fixed to the
    # surface.
    made = World(kind, [seed], frames=3).render(96, 128, OUTPUTS, supersample=4)
    rgb, masks = made["rgb"], made["masks"]
    border = near_edges(flat(masks), step=0.5)
    for prefix, here, there in (
        ("", slice(None, -1), slice(1, None)),
        ("backward_", slice(1, None), slice(None, -1)),
    ):
        source, target = flat(rgb[:, here]), flat(rgb[:, there])
        flow, hidden = flat(made[f"{prefix}flow"]), flat(made[f"{prefix}occlusion"])
        y, x = pixel_centres(96, 128)
        x, y = x + flow[:, 0], y + flow[:, 1]
        warped = sample(target, x, y)
        edges = sample(border[there].float(), x, y, "nearest") > 0
        clean = ~(grown(hidden) | near_edges(source, step=0.05) | border[here] | edges)
        error = (warped - source).abs().mean(1, keepdim=True)[clean]
        assume(clean.sum() > 200)
        assert error.mean() * 255 < 1, f"{kind} {seed}: {float(error.mean()) * 255:.2f} of 255"


@FEW
@given(seed=SEEDS)
def test_flow_of_a_still_scene_is_that_of_depth_and_camera(seed):
    world = World("flyover", [seed], frames=3, motion=3)
    made = world.render(H, W, ("depth", "flow", "backward_flow"))
    intrinsics, poses = world.cameras(H, W)
    y, x = pixel_centres()
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(intrinsics[0]).T
    for name, here, there in (("flow", 0, 1), ("backward_flow", 1, 0)):
        carry = intrinsics[0].double() @ (poses[0, there].double().inverse() @ poses[0, here].double())[:3]
        points = rays.double() * made["depth"][0, here, 0, ..., None]
        pixel = points @ carry[:, :3].T + carry[:, 3]
        flow = torch.stack([pixel[..., 0] / pixel[..., 2] - x, pixel[..., 1] / pixel[..., 2] - y])
        torch.testing.assert_close(made[name][0, 0], flow.float(), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["objects", "motion", "flyover"])
@FEW
@given(seed=SEEDS)
def test_what_is_seen_in_both_frames_lies_on_the_same_body(kind, seed):
    world = World(kind, [seed], frames=3)
    made = world.render(H, W, ("flow", "occlusion", "masks"))
    hidden = made["occlusion"][0, :, 0] > 0
    y, x = pixel_centres()
    to_x, to_y = x + made["flow"][0, :, 0], y + made["flow"][0, :, 1]
    rim = 1e-3  # rounding decides on the very edge
    outside = (to_x < -rim) | (to_x > W + rim) | (to_y < -rim) | (to_y > H + rim)
    assert hidden[outside].all()
    # A point that is seen in both frames belongs to the same body in both.
    masks = made["masks"][0]
    carried = sample(masks[1:], to_x, to_y, "nearest")
    inner = ~near_edges(masks[1:], step=0.5)
    inner = sample(inner.float(), to_x, to_y, "nearest")[:, 0] > 0
    inner &= (to_x > 2) & (to_x < W - 2) & (to_y > 2) & (to_y < H - 2)
    same = (carried * masks[:-1]).sum(1) > 0
    assert (same | hidden)[inner].all()
    # Where nothing moves apart from its neighbours, nothing is hidden.
    assert hidden[~outside].float().mean() < 0.35


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seed=SEEDS)
def test_depths_of_two_views_are_of_one_surface(kind, seed):
    world = World(kind, [seed], frames=1)
    depth = world.render(H, W, ("depth",), views=2, arc=16)["depth"][0, :, 0, 0]
    intrinsics, poses = world.cameras(H, W, views=2, arc=16)
    y, x = pixel_centres()
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(intrinsics[0]).T
    points = rays * depth[0, ..., None]
    there = torch.linalg.inv(poses[0, 1, 0]) @ poses[0, 0, 0]
    points = points @ there[:3, :3].T + there[:3, 3]
    pixel = points @ intrinsics[0].T
    u, v = pixel[..., 0] / pixel[..., 2], pixel[..., 1] / pixel[..., 2]
    other = sample(depth[1][None, None], u[None], v[None], "bilinear")[0, 0]
    inside = (u > 1) & (u < W - 1) & (v > 1) & (v < H - 1) & (points[..., 2] > 0.1)
    steep = near_edges(depth[1][None, None].log(), reach=1, step=0.03)
    inside &= ~(sample(steep.float(), u[None], v[None], "bilinear")[0, 0] > 0)
    ratio = (other / points[..., 2])[inside]
    # Nearer: something stands between. Farther: the second view would see through the surface.
    assert (ratio < 1.01).all()
    assert ((ratio - 1).abs() < 0.01).float().mean() > 0.6


@FEW
@given(seed=SEEDS)
def test_depth_of_a_ball_lies_on_its_sphere(seed):
    world = World("bounce", [seed], frames=8)
    made = world.render(H, W, ("depth", "masks"))
    intrinsics, poses = world.cameras(H, W)
    y, x = pixel_centres()
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(intrinsics[0]).T
    points = rays * made["depth"][0, :, 0, ..., None]
    points = torch.einsum("tij,thwj->thwi", poses[0, :, :3, :3], points) + poses[0, :, None, None, :3, 3]
    centre = world.trajectories(H, W)["centres"][0, :, 1]
    distance = (points - centre[:, None, None]).norm(dim=-1)[made["masks"][0, :, 1] > 0]
    torch.testing.assert_close(distance, torch.full_like(distance, world.scenes[0].bodies[1].radius), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seed=SEEDS)
def test_masks_partition_the_picture_and_lie_in_their_boxes(kind, seed):
    world = World(kind, [seed], frames=3)
    masks = world.render(H, W, ("masks",))["masks"][0]
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks.sum(1) == 1).all()
    found = world.trajectories(H, W)
    y, x = pixel_centres()
    x0, y0, x1, y1 = (found["boxes"][0, ..., i, None, None] for i in range(4))
    inside = (x > x0 - 0.01) & (x < x1 + 0.01) & (y > y0 - 0.01) & (y < y1 + 0.01)
    assert (inside | (masks == 0)).all()
    assert not masks[:, ~found["present"][0]].any()


def test_a_box_touches_the_mask_of_an_unhidden_ball_on_all_sides():
    world = World("bounce", range(6), frames=4)
    masks, boxes = world.render(256, 256, ("masks",))["masks"], world.trajectories(256, 256)["boxes"]
    for b in range(6):
        for t in range(4):
            ys, xs = masks[b, t, 1].nonzero(as_tuple=True)
            tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (boxes[b, t, 1] - tight).abs().max() < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_has_the_same_bits_alone_and_in_any_batch(kind):
    first = World(kind, [7, 3, 11], frames=3).render(40, 56, OUTPUTS)
    again = World(kind, [7, 3, 11], frames=3).render(40, 56, OUTPUTS)
    alone = World(kind, [3], frames=3).render(40, 56, OUTPUTS)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[1:2], alone[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_resolution_does_not_change_the_scene(kind):
    world = World(kind, [5], frames=2)
    fine, coarse = world.render(96, 128)["rgb"], world.render(48, 64, supersample=2)["rgb"]
    torch.testing.assert_close(F.avg_pool2d(fine[0], 2), coarse[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_the_same_in_any_window(kind):
    world = World(kind, [2], frames=6)
    options = {"noise": 0.02, "blur": 2}
    whole, part = (
        world.render(32, 32, **options)["rgb"],
        world.render(32, 32, start=2, stop=5, **options)["rgb"],
    )
    assert torch.equal(whole[:, 2:5], part)


def test_a_clip_is_lazy_and_its_frames_do_not_depend_on_where_reading_starts():
    clip = frameloom.world.clip(seed=1, frames=7, height=32, width=48, supersample=1)
    assert (len(clip), clip.info.width, clip.info.height) == (7, 48, 32)
    assert torch.equal(clip.tensor()[3:6], clip[3:6].tensor())


def test_views_share_the_scene_and_the_first_is_the_camera():
    world = World("objects", [4], frames=2)
    plain = world.render(H, W, ("rgb", "masks", "flow"))
    views = world.render(H, W, ("rgb", "masks", "flow"), views=3, arc=90)
    for name, value in plain.items():
        assert views[name].shape == (1, 3, *value.shape[1:])
        assert torch.equal(views[name][:, 0], value)
    assert not torch.equal(views["rgb"][:, 1], plain["rgb"])


def test_blur_is_the_average_of_instants():
    world = World("motion", [8], frames=2, fps=8, motion=12)
    sharp, blurred = (world.render(H, W, blur=n)["rgb"] for n in (1, 8))
    assert (blurred - sharp).abs().mean() > 1e-3
    assert blurred.diff(dim=-1).abs().mean() < sharp.diff(dim=-1).abs().mean()


def test_noise_has_the_given_deviation_and_differs_between_frames():
    world = World("objects", [8], frames=2)
    grain = world.render(64, 64, noise=0.02)["rgb"] - world.render(64, 64)["rgb"]
    assert abs(float(grain.std()) - 0.02) < 0.002
    assert not torch.equal(grain[:, 0], grain[:, 1])


def test_motion_is_in_pixels_a_frame():
    for motion in (1.0, 6.0):
        flow = World("motion", range(12), frames=6, motion=motion, size=64).render(64, 64, ("flow",))["flow"]
        fastest = flow.norm(dim=2).flatten(1).quantile(0.99, dim=1)
        assert 0.3 * motion < float(fastest.median()) < 1.8 * motion


def test_an_item_of_a_data_set_depends_on_seed_and_index_alone():
    options = {"frames": 2, "height": 24, "width": 32, "outputs": ("rgb", "flow"), "supersample": 2}
    data, longer = (
        WorldDataset("objects", seed=1, length=5, **options),
        WorldDataset("objects", seed=1, **options),
    )
    batch = data.batch([4, 0])
    for name, value in data[4].items():
        assert torch.equal(batch[name][0], value)
        assert torch.equal(longer[4][name], value)
    assert not torch.equal(WorldDataset("objects", seed=2, **options)[4]["rgb"], data[4]["rgb"])
    with pytest.raises(IndexError):
        data[5]


def test_every_kind_collates():
    for kind in KINDS:
        data = WorldDataset(kind, frames=2, height=16, width=16, outputs=OUTPUTS)
        batch = torch.utils.data.default_collate([data[0], data[1]])
        assert batch["masks"].shape[:2] == (2, 2)
        assert batch["rgb"].min() >= 0 and batch["rgb"].max() <= 1  # noqa: PT018


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: World("weather", [0]), "objects"),
        (lambda: World("objects", [0], frames=0), "1 frame"),
        (lambda: World("objects", []), "seed"),
        (lambda: World("objects", [0]).render(8, 8, ("rgb", "normals")), "normals"),
        (lambda: World("objects", [0]).render(0, 8), "0x8"),
        (lambda: World("objects", [0]).joints(8, 8), "figure"),
        (lambda: World("objects", [0], voice=[torch.zeros(9).numpy()]), "talk"),
    ],
)
def test_mistakes_are_answered_in_one_line(act, message):
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_occlusion_is_what_a_ball_covers_and_uncovers():
    # Before a backdrop that stands still, a point of it is hidden exactly where the other frame shows the
    # ball.
    world = World("bounce", [1], frames=8)
    made = world.render(H, W, ("occlusion", "backward_occlusion", "masks"))
    ball, box = made["masks"][0, :, 1], made["masks"][0, :, 2]
    ground = (made["masks"][0, :, 0] > 0) & (box == 0)
    assert torch.equal(made["occlusion"][0, :, 0][ground[:-1]], ball[1:][ground[:-1]])
    assert torch.equal(made["backward_occlusion"][0, :, 0][ground[1:]], ball[:-1][ground[1:]])
    assert made["occlusion"].sum() > 0


def test_a_flying_camera_never_enters_anything():
    # Inside a body every ray ends at its wall; outside some reach the ground or the sky.
    depth = World("flyover", range(10), frames=40, fps=2, motion=6).render(12, 16, ("depth",))["depth"]
    assert depth.amin(dim=(2, 3, 4)).min() > 0.15
    assert depth.amax(dim=(2, 3, 4)).min() > 5

# SPDX-License-Identifier: Apache-2.0
"""Parcellation: geometry, sides, mask and table, with a network of known output."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from brainprior_bids.anatomy.padding import unmeasured
from brainprior_bids.anatomy.parcellation import (
    CSF,
    class_probabilities,
    mirrored,
    parcellate,
    structure_names,
)
from brainprior_bids.anatomy.separable import averaging_matrix
from brainprior_bids.engine.errors import AnatomyError, ShapeMismatchError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import (
    ParcellationNetwork,
    normalise_intensity,
    shuffle,
    unshuffle,
)
from brainprior_bids.engine.weights import load_parcellation, write_weights

LEVELS = {258: 0.15, 24: 0.3, 3: 0.45, 2: 0.6, 10: 0.8, 4: 1.0}
"""Class (left where sided) -> brightness in the toy head."""


class Oracle(nn.Module):
    """Determines the class from the brightness and the side from the first axis."""

    def __init__(self):
        super().__init__()
        self.classes = (0, *LEVELS, 42, 41, 49, 43)
        self.multiple = 8
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        levels = torch.tensor([0.0, *LEVELS.values(), 0.45, 0.6, 0.8, 1.0])
        logits = -4000 * (x / x.max() - levels[:, None, None, None]) ** 2
        right = torch.arange(x.shape[2])[:, None, None] >= x.shape[2] / 2
        sided = [self.classes.index(v) for v in (3, 2, 10, 4)]
        other = [self.classes.index(v) for v in (42, 41, 49, 43)]
        logits[:, sided] -= 1e4 * right
        logits[:, other] -= 1e4 * ~right
        return logits


def toy_head(zooms, rotation=(0, 0, 0), field_of_view=(170, 200, 160)):
    """Ellipsoid brain in a head, painted by LEVELS, around the scanner's origin."""
    shape = [round(f / z) for f, z in zip(field_of_view, zooms, strict=True)]
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag(zooms)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    grid = Grid(tuple(shape), affine)
    fine = [max(round(z), 1) for z in zooms]  # sub-voxels, for partial volume
    mm = [
        (np.arange(n * f) - (n * f - 1) / 2) * z / f
        for n, f, z in zip(shape, fine, zooms, strict=True)
    ]
    image = np.zeros([len(axis) for axis in mm], np.float32)

    def paint(radii, value, at=(0, 0, 0)):
        x, y, z = (((m - c) / r) ** 2 for m, c, r in zip(mm, at, radii, strict=True))
        image[x[:, None, None] + y[:, None] + z < 1] = value

    paint((78, 92, 75), LEVELS[258])
    paint((62, 78, 58), LEVELS[24])
    paint((60, 76, 56), LEVELS[3])
    paint((52, 68, 48), LEVELS[2])
    for side in (-1, 1):
        paint((9, 16, 9), LEVELS[10], at=(side * 18, -8, 0))
        paint((7, 22, 9), LEVELS[4], at=(side * 16, 5, 24))
    (a, b, c), (i, j, k) = shape, fine
    image = image.reshape(a, i, b, j, c, k).mean((1, 3, 5))
    return nib.Nifti1Image(image * 700, affine), grid


@pytest.mark.parametrize(
    ("zooms", "rotation"),
    [((1.0, 1.0, 1.0), (0, 0, 0)), ((1.5, 1.5, 5.0), (8, -12, 5)), ((4.0, 1.2, 1.2), (0, 0, 0))],
)
def test_structures_are_where_they_are(zooms, rotation):
    image, grid = toy_head(zooms, rotation)
    restored = grid.one_millimetre()
    result = parcellate(image, network=Oracle(), restored_grid=restored)
    assert result.structures.shape == result.mask.shape == restored.shape
    assert result.mask_scan.shape == image.shape
    table = {row["index"]: row for row in result.table}
    turn = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    for index, centre in ((10, (-18, -8, 0)), (49, (18, -8, 0)), (4, (-16, 5, 24))):
        expected = turn @ centre
        np.testing.assert_allclose(table[index]["centroid_mm"], expected, atol=max(zooms) / 2)
    assert table[10]["volume_mm3"] == pytest.approx(4 / 3 * np.pi * 9 * 16 * 9, rel=0.35)
    ml = result.mask.sum() * np.prod(restored.spacing_mm) / 1000
    assert ml == pytest.approx(4 / 3 * np.pi * 62 * 78 * 58 / 1000, rel=0.06)
    # the scan's own voxels: the same volume, as shares
    share_ml = result.mask_scan.sum() * np.prod(zooms) / 1000
    assert share_ml == pytest.approx(ml, rel=1e-3)
    assert result.mask_scan.min() >= 0
    assert result.mask_scan.max() <= 1 + 1e-5
    assert not result.structures[result.mask == 0].any()
    assert (result.structures[result.mask == 1] > 0).all()


def test_holes_are_filled_and_islands_dropped():
    image, grid = toy_head((2.0, 2.0, 2.0))
    data = image.get_fdata()
    data[45:48, 38:41, 30:33] = 0  # a flow void in white matter
    data[4:9, 4:9, 4:9] = 700 * LEVELS[2]  # a bright object in the air
    result = parcellate(
        nib.Nifti1Image(data.astype(np.float32), image.affine),
        network=Oracle(),
        restored_grid=grid.one_millimetre(),
    )
    assert result.mask[91:95, 77:81, 61:65].all()
    assert not result.mask[:20, :20, :20].any()


def test_a_cut_brain_is_a_warning_and_no_brain_an_error():
    image, _ = toy_head((2.0, 2.0, 2.0))
    cut = image.slicer[:, :, :46]
    result = parcellate(
        cut, network=Oracle(), restored_grid=Grid(cut.shape, cut.affine).one_millimetre()
    )
    assert any("field of view cuts" in warning for warning in result.warnings)
    for data in (np.zeros((40, 40, 40)), image.get_fdata()[:, :, :14]):
        bad = nib.Nifti1Image(np.asarray(data, np.float32), image.affine)
        with pytest.raises(AnatomyError, match="expected a brain"):
            parcellate(
                bad, network=Oracle(), restored_grid=Grid(bad.shape, bad.affine).one_millimetre()
            )


def cut_cm2(found):
    """Area of the mask where the brain is cut, as in the quality metrics."""
    return sum(row["cut_share"] * row["volume_mm3"] ** (2 / 3) for row in found.table) / 100


@pytest.mark.parametrize("zooms", [(1.0, 1.0, 1.0), (1.2, 1.2, 5.0)])
@pytest.mark.parametrize("kind", ["top", "back", "another value", "oblique", "stripped"])
def test_padding_is_a_cut_like_the_border(zooms, kind):
    """The same cut, with and without padding."""
    image, grid = toy_head(zooms, rotation=(0, 0, 0) if kind == "stripped" else (8, 0, 0))
    data = image.get_fdata(dtype=np.float32)
    if kind == "stripped":
        data[data < 700 * 0.2] = 0
    half = data.shape[2] // 2 + 8
    crop = image.slicer[:, :, :half]
    if kind == "back":
        crop = image.slicer[:, data.shape[1] // 3 :]
        data[:, : data.shape[1] // 3] = 0
    elif kind == "oblique":
        index = np.indices(data.shape) * np.array(zooms)[:, None, None, None]
        data[index[2] + 0.3 * index[1] > half * zooms[2] + 30] = 0
    else:
        data[:, :, half:] = -40 if kind == "another value" else 0
    padded = nib.Nifti1Image(data, image.affine)
    one, other = (
        parcellate(i, network=Oracle(), restored_grid=Grid(i.shape, i.affine).one_millimetre())
        for i in (crop, padded)
    )
    (warning,) = [text for text in other.warnings if "field of view cuts" in text]
    assert "padded with one value" in warning
    assert cut_cm2(one) > 50
    # the edge of an oblique padding is a staircase
    assert cut_cm2(one) * 0.8 < cut_cm2(other) < cut_cm2(one) * 1.5
    empty = unmeasured(padded, other.mask)
    assert not other.mask[empty].any()
    if kind in ("top", "another value", "stripped"):
        top = round(half * zooms[2] / grid.one_millimetre().spacing_mm[2])
        assert not other.mask[:, :, top:].any()
        assert other.mask[:, :, top - 2].any()


@pytest.mark.parametrize("kind", ["whole", "stripped", "defaced", "no noise"])
def test_a_background_is_no_padding(kind):
    image, grid = toy_head((1.2, 1.2, 5.0))
    data = image.get_fdata(dtype=np.float32)
    if kind == "stripped":
        data[data < 700 * 0.2] = 0
    elif kind == "defaced":  # up to the brain's front
        data[:, 152:, :20] = 0
    if kind in ("whole", "defaced"):  # with noise, which integers make 0 in half of the voxels
        rng = np.random.default_rng(0)
        data = np.where(data > 0, data, np.round(rng.normal(0, 0.7, data.shape)).clip(0))
    scan = nib.Nifti1Image(data.astype(np.float32), image.affine)
    result = parcellate(scan, network=Oracle(), restored_grid=grid.one_millimetre())
    assert cut_cm2(result) < 1
    assert not [text for text in result.warnings if "cuts" in text]


def test_a_tiny_and_a_giant_brain_are_refused():
    image, _ = toy_head((2.0, 2.0, 2.0))
    for size in (1.0, 4.0):
        affine = np.diag([size, size, size, 1.0])
        scaled = nib.Nifti1Image(image.get_fdata(dtype=np.float32), affine)
        grid = Grid(scaled.shape, affine).one_millimetre()
        with pytest.raises(AnatomyError, match="ml"):
            parcellate(scaled, network=Oracle(), restored_grid=grid)


def test_a_brain_without_inner_structures_is_refused():
    image, grid = toy_head((2.0, 2.0, 2.0))
    data = image.get_fdata(dtype=np.float32)
    data[data > 700 * 0.5] = 700 * LEVELS[2]
    data[0, 0, 0] = 700  # keeps the scale of brightness
    with pytest.raises(AnatomyError, match="inner structures"):
        parcellate(
            nib.Nifti1Image(data, image.affine),
            network=Oracle(),
            restored_grid=grid.one_millimetre(),
        )


def test_a_grid_with_other_edges_is_refused():
    image, grid = toy_head((2.0, 2.0, 2.0))
    other = Grid(grid.shape, grid.affine @ np.diag([1.01, 1, 1, 1]))
    with pytest.raises(ShapeMismatchError, match="axes and edges"):
        parcellate(image, network=Oracle(), restored_grid=other)


def test_resampling_matrices():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    down = averaging_matrix(30, 20)
    np.testing.assert_allclose(down.sum(1), 1, rtol=1e-6)
    assert (down @ x).mean() == pytest.approx(x.mean(), abs=1e-6)  # area is kept
    np.testing.assert_allclose(averaging_matrix(30, 10) @ x, x.reshape(10, 3).mean(1), rtol=1e-5)
    up = averaging_matrix(30, 75)
    ramp = np.arange(30.0)
    expected = np.clip((np.arange(75) + 0.5) / 2.5 - 0.5, 0, 29)
    np.testing.assert_allclose(up @ ramp, expected, atol=1e-4)


def test_every_sided_structure_has_its_partner():
    names = structure_names()
    assert len(names) == 32
    for index, name in names.items():
        assert mirrored(mirrored(index)) == index
        assert (mirrored(index) == index) == (not name.startswith(("Left-", "Right-")))
    assert mirrored(17) == 53
    assert mirrored(CSF) == CSF


def test_probabilities_are_mirrored_with_the_image():
    torch.manual_seed(0)
    network = ParcellationNetwork((0, 2, 41, 16), widths=(8, 8)).eval()
    x = torch.rand(24, 24, 24)
    a = class_probabilities(x, network)
    b = class_probabilities(x.flip(0), network)
    torch.testing.assert_close(b.flip(1)[[0, 2, 1, 3]], a, atol=2e-3, rtol=0)
    torch.testing.assert_close(a.sum(0), torch.ones(24, 24, 24))


def test_unshuffle_and_shuffle_are_inverse():
    x = torch.rand(2, 3, 4, 6, 8)
    assert torch.equal(shuffle(unshuffle(x)), x)
    # channel order: sub-voxels of one class stay together
    assert torch.equal(unshuffle(x)[:, 0], x[:, 0, ::2, ::2, ::2])


def test_the_network_has_no_statistic_over_space():
    torch.manual_seed(0)
    network = ParcellationNetwork((0, 2, 41), widths=(8, 8)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.rand(1, 1, 128, 16, 16)
    changed = x.clone()
    changed[:, :, :16] = 5 * torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        a, b = network(x), network(changed)
    assert (a[:, :, :16] - b[:, :, :16]).abs().max() > 1e-3
    assert torch.equal(a[:, :, 96:], b[:, :, 96:])


def test_normalisation_hardly_depends_on_air_and_not_on_scale():
    rng = torch.Generator().manual_seed(0)
    head = torch.rand(20, 20, 20, generator=rng) * 100 + 50
    padded = torch.nn.functional.pad(head, [10] * 6)
    a, b = normalise_intensity(head), normalise_intensity(padded)[10:30, 10:30, 10:30]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(normalise_intensity(head * 1e3), a)
    assert a.max() < 1.1
    assert not normalise_intensity(torch.full((4, 4, 4), -1.0)).any()


def test_weights_come_back(tmp_path):
    torch.manual_seed(1)
    network = ParcellationNetwork((0, 2, 41, 16), widths=(8, 8)).eval()
    state = {f"network.{name}": value.half() for name, value in network.state_dict().items()}
    facts = {
        "kind": "parcellation",
        "name": "toy",
        "licence": "Apache-2.0",
        "training_data": "none",
        "config": network.config,
    }
    write_weights(tmp_path / "p.safetensors", state, facts)
    again = load_parcellation(tmp_path / "p.safetensors")
    assert again.config == network.config
    assert again.metadata["name"] == "toy"
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(x), network(x), atol=1e-2, rtol=1e-2)


@pytest.mark.shared
@pytest.mark.parametrize("suffix", ["T1w", "T2w"])
def test_a_real_head(shared_data, suffix):
    path = shared_data / "heads" / "sub-02" / "anat" / f"sub-02_{suffix}.nii.gz"
    image = nib.as_closest_canonical(nib.load(path))
    grid = Grid(image.shape, image.affine).one_millimetre()
    result = parcellate(image, network=load_parcellation(), restored_grid=grid)
    ml = result.mask.sum() * np.prod(grid.spacing_mm) / 1000
    assert 1000 < ml < 1900
    table = {row["name"]: row for row in result.table}
    assert len(table) >= 28
    thalami = [np.array(table[f"{side}-Thalamus"]["centroid_mm"]) for side in ("Left", "Right")]
    apart = thalami[1] - thalami[0]
    assert 15 < apart[0] < 35  # left is left
    assert abs(apart[1:]).max() < 8

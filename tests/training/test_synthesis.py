# SPDX-License-Identifier: Apache-2.0
"""Synthetic brains and heads: intensities, geometry, sides, damage."""

import numpy as np
import pytest
import torch

from brainprior_bids.engine.errors import InputError
from brainprior_bids.training.synthesis import (
    CLASSES,
    CSF,
    HEAD,
    LEFT_RIGHT,
    SKULL,
    HeadMap,
    HeadSettings,
    HeadSynthesiser,
    bounding_box,
    brain_mask,
    load_labels,
    mean_t1_head,
    slice_matrix,
    synthesise_brain,
)


@pytest.fixture(scope="module")
def toy_head():
    """Nested balls, 1 mm: skin, bone, fluid, cortex, white matter, left and right of x = 40."""
    centre = np.array([40, 44, 42])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (80, 90, 84)), indexing="ij"), -1)
    r = np.linalg.norm(grid - centre - 0.5, axis=-1)
    labels = np.zeros(r.shape, np.int16)
    for radius, value in ((37, 511), (34, 515), (31, CSF), (27, 3), (20, 2), (6, 4)):
        labels[r < radius] = value
    right = grid[..., 0] >= centre[0] + 0.5
    for left, other in LEFT_RIGHT.items():
        labels[right & (labels == left)] = other
    return labels


def test_the_mask_is_the_closed_brain_with_one_voxel_of_fluid(toy_head):
    sulcus = toy_head.copy()
    sulcus[39:42, 60:75, 42] = np.where(toy_head[39:42, 60:75, 42] < 500, CSF, 515)
    mask = brain_mask(sulcus)
    assert mask[40, 66, 42]  # fluid between the gyri
    assert mask[40, 44, 42]
    assert not mask[toy_head >= 500].any()
    r = np.cbrt(3 * mask.sum() / (4 * np.pi))
    assert 27.5 < r < 28.6  # the cortex ends at 27


@pytest.mark.parametrize("contrast", ["T1w", "T2w", "FLAIR", "unknown"])
def test_a_brain_has_the_engine_s_unit_and_nothing_outside(toy_head, contrast):
    mask = brain_mask(toy_head)
    brain = synthesise_brain(toy_head, contrast, np.random.default_rng(0), mask=mask)
    assert brain.dtype == np.float32
    assert brain.shape == toy_head.shape
    assert np.percentile(brain[mask], 99) == pytest.approx(1, abs=1e-3)
    assert not brain[~mask].any()
    assert brain.min() >= 0


def test_the_order_of_tissues_is_that_of_the_contrast(toy_head):
    mask = brain_mask(toy_head)
    white, grey, fluid = (np.isin(toy_head, v) for v in ((2, 41), (3, 42), (4, 43)))
    for seed in range(3):
        means = {}
        for contrast in ("T1w", "T2w", "FLAIR"):
            rng = np.random.default_rng(seed)
            brain = synthesise_brain(toy_head, contrast, rng, mask=mask)
            means[contrast] = [brain[part].mean() for part in (white, grey, fluid)]
        assert means["T1w"][0] > means["T1w"][1] > means["T1w"][2]
        assert means["T2w"][0] < means["T2w"][1] < means["T2w"][2]
        assert means["FLAIR"][2] < means["FLAIR"][0] < means["FLAIR"][1]


def test_the_same_seed_gives_the_same_brain(toy_head):
    mask = brain_mask(toy_head)
    a, b, c = (
        synthesise_brain(toy_head, "unknown", np.random.default_rng(s), mask=mask)
        for s in (5, 5, 6)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


def test_an_unknown_contrast_name_is_refused(toy_head):
    with pytest.raises(InputError, match="contrast must be one of"):
        synthesise_brain(toy_head, "PDw", np.random.default_rng(0))


def test_the_box_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one voxel"):
        bounding_box(np.zeros((3, 3, 3), bool), 1)


def test_without_deformation_the_target_is_the_label_map(toy_head):
    head = HeadMap.from_labels(toy_head)
    synthesiser = HeadSynthesiser([head], shape=(32, 32, 32))
    settings = HeadSettings("T1w", 2.0, deform=False, damage=False, noise_sd=0.0)
    image, target = synthesiser.draw(torch.Generator().manual_seed(0), settings)
    assert image.shape == (1, 32, 32, 32)
    values = torch.tensor(CLASSES)[target]
    # left is the lower half of the first axis, as in RAS
    half = values[:16], values[16:]
    assert (half[0] == 2).sum() > 1000
    assert (half[1] == 41).sum() > 1000
    assert not (half[0] == 41).sum() > 60  # the plane between the sides crosses voxels
    for value, volume in ((4, 2 / 3 * np.pi * 6**3), (2, 2 / 3 * np.pi * (20**3 - 6**3))):
        assert float((values == value).sum()) * 8 == pytest.approx(volume, rel=0.12)
    # bright white matter, dark fluid
    assert image[0][values == 2].mean() > 1.5 * image[0][values == 4].mean()


def test_flips_exchange_the_labels(toy_head):
    """In half of the draws the map is mirrored; left must nevertheless stay on the left."""
    synthesiser = HeadSynthesiser([HeadMap.from_labels(toy_head)], shape=(32, 32, 32))
    settings = HeadSettings("T1w", 2.0, damage=False)
    for seed in range(6):
        _, target = synthesiser.draw(torch.Generator().manual_seed(seed), settings)
        values = torch.tensor(CLASSES)[target]
        x = torch.arange(32.0)[:, None, None].expand(32, 32, 32)
        assert x[values == 2].mean() + 3 < x[values == 41].mean()


def test_draws_are_reproducible_and_finite(toy_head):
    synthesiser = HeadSynthesiser([HeadMap.from_labels(toy_head)], shape=(32, 32, 32))
    for seed in range(12):
        image, target = synthesiser.draw(torch.Generator().manual_seed(seed))
        again, _ = synthesiser.draw(torch.Generator().manual_seed(seed))
        assert torch.equal(image, again)
        assert torch.isfinite(image).all()
        assert image.min() >= 0
        assert target.min() >= 0
        assert target.max() < len(CLASSES)


def test_where_the_field_of_view_ends_image_and_target_are_zero(toy_head):
    synthesiser = HeadSynthesiser([HeadMap.from_labels(toy_head)], shape=(32, 32, 32))
    cut = 0
    for seed in range(20):
        settings = HeadSettings("T1w", 2.0, noise_sd=0.05)
        image, target = synthesiser.draw(torch.Generator().manual_seed(seed), settings)
        nothing = image[0] == 0
        cut += bool(nothing.float().mean() > 0.2)
        assert (target[nothing] == 0).float().mean() > 0.95
    assert cut > 5


@pytest.mark.parametrize(("thickness", "spacing"), [(5.0, 5.0), (3.0, 4.0), (9.0, 9.0)])
def test_slices_average_and_come_back(thickness, spacing):
    average, interpolate = slice_matrix(60, 2.0, thickness, spacing, 0.3)
    torch.testing.assert_close(average.sum(1), torch.ones(len(average)))
    torch.testing.assert_close(interpolate.sum(1), torch.ones(60))
    # a ramp survives averaging and linear interpolation, except beyond the outermost slices
    ramp = torch.arange(60.0)
    back = interpolate @ (average @ ramp)
    inner = slice(6, -6)
    torch.testing.assert_close(back[inner], ramp[inner], atol=0.35, rtol=0)


def test_mean_t1_head_orders_the_tissues(toy_head):
    head = mean_t1_head(toy_head)
    white, grey, bone = (head[toy_head == value].mean() for value in (2, 3, 515))
    assert white > grey > bone


@pytest.mark.shared
def test_a_real_label_map(shared_data):
    labels, affine = load_labels(shared_data / "labels" / "training_seg_15.nii.gz")
    assert np.allclose(np.diag(affine)[:3], 1, atol=0.01)
    mask = brain_mask(labels)
    tissue = (labels > 0) & (labels < 500) & (labels != CSF)
    assert 1.05 < mask.sum() / tissue.sum() < 1.35
    head = HeadMap.from_labels(labels)
    image, target = HeadSynthesiser([head]).draw(
        torch.Generator().manual_seed(1), HeadSettings("T2w", 5.0, damage=False)
    )
    present = set(torch.tensor(CLASSES)[target].unique().tolist())
    assert present == set(CLASSES)
    assert {SKULL, HEAD} <= present
    assert image.max() > 0.8

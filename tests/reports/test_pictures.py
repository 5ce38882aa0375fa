# SPDX-License-Identifier: Apache-2.0
"""The pictures of a scan: left is left for every storage order; coordinates; size; contents."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nibabel as nb
import numpy as np
import pytest
from lxml import etree, html
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image
from scipy.spatial.transform import Rotation

from brainprior_bids.engine.grids import MNI305, Grid
from brainprior_bids.interfaces.derivatives import Reportlets
from brainprior_bids.records import TissuesRecord
from brainprior_bids.reports import atlas, viewer, volumes
from brainprior_bids.reports.reportlets import (
    REPORTLETS,
    UNCERTAIN_PERCENT,
    ScanImages,
    make_reportlets,
    make_viewers,
    tissues_record,
)

SVG = "{http://www.w3.org/2000/svg}"
BRAIN_CENTRE = np.array([3.0, -12.0, 20.0])
SEMI_AXES = np.array([30.0, 40.0, 28.0])
MARKS = np.array([[-17.0, 0.0, 0.0], [0.0, 25.0, 0.0]])
"""To the left and to the front of the centre; mm in the head's own axes."""
LEFT = (42 - 17) / 84  # share of the width: 60 mm of brain and 12 mm of margin on each side
FRONT = (52 - 25) / 104
EXPECTED = (-11.0, -16.0, 19.0)  # MNI305 mm, of a structure
FOUND = (-15.0, -10.0, 22.0)


def head(grid, rotation):
    """Brain, marks and mask of a synthetic head that is rotated with the scan's axes.

    Returns (image, mask); the marks are 3 times as bright as the brain.
    """
    points = np.moveaxis(grid.points_mm().astype(float), 0, -1) - BRAIN_CENTRE
    points = points @ rotation  # into the head's own axes
    brain = ((points / SEMI_AXES) ** 2).sum(-1) < 1
    image = np.where(brain, 100.0, 0.0)
    for mark in MARKS:
        image[((points - mark) ** 2).sum(-1) < 6**2] = 300.0
    return image.astype(np.float32), brain.astype(np.float32)


def stored(image, grid, codes):
    """A NIfTI image of a canonical array, stored along other axes."""
    turn = ornt_transform(io_orientation(grid.affine), axcodes2ornt(tuple(codes)))
    data = nb.orientations.apply_orientation(image, turn)
    return nb.Nifti1Image(data, grid.affine @ inv_ornt_aff(turn, image.shape))


def node_files(folder, *, codes="RAS", angles=(0, 0, 0), spacing=(2.0, 2.0, 5.0)):
    """Files of a synthetic head, as the nodes write them."""
    folder.mkdir(parents=True, exist_ok=True)
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    shape = tuple(int(np.ceil(112 / s)) for s in spacing)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(spacing)
    affine[:3, 3] = BRAIN_CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, affine)
    fine = grid.one_millimetre()
    scan, mask_scan = head(grid, rotation)
    restored, mask = head(fine, rotation)
    restored *= mask
    labels = np.where(np.arange(fine.shape[0])[:, None, None] < fine.shape[0] / 2, 3, 42) * mask
    mni, brain = head(MNI305, np.eye(3))
    arrays = {
        "scan": (scan, grid),
        "mask_scan": (mask_scan, grid),
        "log_bias": (np.linspace(-0.2, 0.2, scan.size).reshape(scan.shape), grid),
        "residual": (np.sin(np.arange(scan.size)).reshape(scan.shape), grid),
        "restored": (restored, fine),
        "mask": (mask, fine),
        "structures": (labels, fine),
        "uncertainty": (5 * mask + 0.02 * restored, fine),
        "restored_mni305": (mni * brain, MNI305),
    }
    files = {}
    for role, (array, on) in arrays.items():
        files[role] = folder / f"{role}.nii.gz"
        nb.save(stored(array.astype(np.float32), on, codes), files[role])
    tables = {
        "conform": {"acquisition": {"slice_axis": 2, "thickness_mm": 5, "spacing_mm": 5}},
        "structures_table": {
            "table": [{"index": 10, "name": "Left-Thalamus", "centroid_mm": FOUND}]
        },
        "affine": {
            "matrix": np.eye(4).tolist(),
            "dof": 12,
            "used": ["Left-Thalamus", "Right-Thalamus"],
            "median_residual_mm": 7.81,
            "hull_residual_mm": 1.25,
        },
        "restore": {"n_samples": 4},
        "gains": {
            "applied": True,
            "gains": [1.02 if k % 2 else 0.98 for k in range(shape[2])],
            "compared": [2 < k < shape[2] - 3 for k in range(shape[2])],
            "alternation_percent": -2.0,
            "alternation_se_percent": 0.1,
            "random_sd_percent": 0.0,
        },
    }
    for role, table in tables.items():
        files[role] = folder / f"{role}.json"
        files[role].write_text(json.dumps(table))
    return files


@pytest.fixture(scope="module", autouse=True)
def reference():
    """A reference of one structure: the picture is tested, not the reference."""
    with pytest.MonkeyPatch.context() as patch:
        structures = {"Left-Thalamus": {"centroid_mm": EXPECTED}}
        patch.setattr(atlas, "mni305_centroids", lambda: {"structures": structures})
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, reference):
    """All pictures of an upright head: desc -> path."""
    folder = tmp_path_factory.mktemp("drawn")
    paths = make_reportlets(
        node_files(folder / "nodes"), folder / "figures", prefix="sub-01_run-02", suffix="T2w"
    )
    return {re.search("_desc-([a-z0-9]+)_", path.name)[1]: path for path in paths}


def images(path):
    """The embedded pictures of an SVG: (element, pixel array), in the order of drawing."""
    result = []
    for element in etree.parse(path).getroot().iter(f"{SVG}image"):
        header, _, content = element.get("href").partition(",")
        assert header == "data:image/png;base64"
        result.append((element, Image.open(io.BytesIO(base64.b64decode(content)))))
    return result


def letters(path, wanted):
    """x of every text that is exactly ``wanted``."""
    return [
        float(element.get("x"))
        for element in etree.parse(path).getroot().iter(f"{SVG}text")
        if element.text == wanted
    ]


def centre_of_mark(picture):
    """(row, column) of the bright mark, as shares of the picture's height and width."""
    pixels = np.asarray(picture.convert("L"), float)
    rows, columns = np.nonzero(pixels > 0.9 * pixels.max())
    return (rows.mean() + 0.5) / pixels.shape[0], (columns.mean() + 0.5) / pixels.shape[1]


def marks_of_axial(picture, left_of=0.4):
    """Row of the front mark and column of the left mark, as shares, in an axial section.

    The left mark is left of ``left_of``, the front mark right of it.
    """
    pixels = np.asarray(picture.convert("L"), float)
    rows, columns = np.nonzero(pixels > 0.9 * pixels.max())
    row = (rows[rows < pixels.shape[0] * 0.38].mean() + 0.5) / pixels.shape[0]
    return row, (columns[columns < pixels.shape[1] * left_of].mean() + 0.5) / pixels.shape[1]


@pytest.mark.parametrize(
    ("codes", "angles"),
    [
        ("RAS", (0, 0, 0)),
        ("LAS", (0, 0, 0)),
        ("LPS", (0, 0, 0)),
        ("PIR", (0, 0, 0)),
        ("SAL", (12, -9, 7)),
        ("RAS", (-20, 15, 10)),
    ],
)
def test_left_is_left_and_front_is_front(tmp_path, codes, angles):
    files = node_files(tmp_path, codes=codes, angles=angles)
    for role in ("log_bias", "residual", "uncertainty", "structures", "restored_mni305"):
        del files[role]
    flicker = make_reportlets(files, tmp_path / "f", prefix="sub-1", suffix="T1w")[0]
    pictures = images(flicker)
    frames = [(e, p) for e, p in pictures if float(e.get("height")) > 50]
    assert len(frames) == 6  # three planes, before and after
    before = [p for e, p in frames if e.get("class") == "before"]
    after = [p for e, p in frames if e.get("class") is None]
    assert len(before) == len(after) == 3
    for sagittal, coronal, axial in (before, after):
        assert centre_of_mark(sagittal)[1] == pytest.approx(1 - FRONT, abs=0.03)
        assert centre_of_mark(coronal)[1] == pytest.approx(LEFT, abs=0.03)
        assert marks_of_axial(axial) == pytest.approx((FRONT, LEFT), abs=0.03)
    left, right = letters(flicker, "L"), letters(flicker, "R")
    assert len(left) == len(right) == 2  # coronal and axial
    assert all(a < b for a, b in zip(left, right, strict=True))
    assert "left of the picture is the participant's left" in flicker.read_text()
    assert ("Scan axes, tilted" in flicker.read_text()) == (angles != (0, 0, 0))


def test_slice_gains_are_drawn_for_2d_scans_only(drawn, tmp_path):
    text = drawn["gains"].read_text()
    assert "Alternation 2.00 ± 0.10 %" in text
    assert ": corrected" in text
    files = node_files(tmp_path)
    files = {role: files[role] for role in ("scan", "mask", "restored", "gains")}
    files["gains"].write_text("{}")
    paths = make_reportlets(files, tmp_path / "f", prefix="sub-1", suffix="T1w")
    assert not any("gains" in path.name for path in paths)


def test_mni305_left_is_left(drawn):
    axial = images(drawn["mni305"])[2][1]  # z = 20 mm, where the left mark is
    left_edge, width = -80, 160  # mm
    expected = (BRAIN_CENTRE[0] + MARKS[0, 0] - left_edge) / width
    assert marks_of_axial(axial, left_of=0.47)[1] == pytest.approx(expected, abs=0.02)


def test_mni305_marks_lie_where_the_millimetres_say(drawn):
    """In the axial section at z = 20 mm: from (-80, 80) mm, the upper left corner of the frame."""
    root = etree.parse(drawn["mni305"]).getroot()
    frame = images(drawn["mni305"])[2][0]
    x, y, wide = (float(frame.get(key)) for key in ("x", "y", "width"))
    scale = wide / 160
    ring = next(e for e in root.iter(f"{SVG}circle"))
    assert ring[0].text == "Left-Thalamus, expected"
    at = [float(ring.get("cx")), float(ring.get("cy"))]
    assert at == pytest.approx(
        [x + (EXPECTED[0] + 80.5) * scale, y + (80 - 0.5 - EXPECTED[1]) * scale], abs=0.1
    )
    cross = next(e for e in root.iter(f"{SVG}path") if len(e) and "found" in e[0].text)
    start = [float(v) + 4 for v in re.match(r"M(\S+) (\S+?)l", cross.get("d")).groups()]
    assert start == pytest.approx(
        [x + (FOUND[0] + 80.5) * scale, y + (80 - 0.5 - FOUND[1]) * scale], abs=0.1
    )


def test_mni305_says_how_well_the_affine_fits(drawn, tmp_path):
    fit = (
        "Median distance of 2 centroids from the expected ones: 7.8 mm; "
        "of the brain's extent: 1.2 mm"
    )
    root = etree.parse(drawn["mni305"]).getroot()
    assert fit in [element.text for element in root.iter(f"{SVG}text")]
    # which the report uses as the alternative text
    assert f"{fit} (affine with 12 degrees of freedom)" in root.find(f"{SVG}desc").text
    files = node_files(tmp_path)
    roles = ("scan", "mask", "restored", "restored_mni305", "affine")
    files["affine"].write_text("{}")  # of an earlier version
    made = make_reportlets(
        {role: files[role] for role in roles}, tmp_path / "f", prefix="sub-1", suffix="T1w"
    )
    (picture,) = (path for path in made if "desc-mni305" in path.name)
    assert "Median distance" not in picture.read_text()


def test_every_picture_is_there_valid_and_light(drawn):
    assert set(drawn) == set(REPORTLETS)
    for path in drawn.values():
        root = etree.parse(path).getroot()
        assert root.tag == f"{SVG}svg"
        assert root.get("viewBox")
        assert root.get("width") is None  # the page sets the width
        assert not re.search(r'(?:href|src)="https?:', path.read_text())
    assert sum(path.stat().st_size for path in drawn.values()) < 2_000_000
    assert drawn["mni305"].name == "sub-01_run-02_space-MNI305_desc-mni305_T2w.svg"
    assert drawn["mask"].name == "sub-01_run-02_desc-mask_T2w.svg"


@pytest.mark.parametrize("what", ["flicker", "slices", "uncertainty", "mask", "bias", "residual"])
def test_every_frame_names_its_plane_and_place(drawn, what):
    text = drawn[what].read_text()
    labels = re.findall(r"(sagittal|coronal|axial)  ([xyz]) = [+−]?\d+ mm", text)
    frames = [e for e, _ in images(drawn[what]) if float(e.get("height")) > 50]
    boxes = {tuple(e.get(k) for k in ("x", "y", "width", "height")) for e in frames}
    assert len(labels) == len(boxes)
    letter_of = {"sagittal": "x", "coronal": "y", "axial": "z"}
    assert all(letter_of[plane] == letter for plane, letter in labels)


def test_the_slices_are_seen_from_the_side(drawn):
    """Slice axis k: sagittal and coronal sections only, measured beside restored."""
    assert "axial  z" not in drawn["slices"].read_text()
    assert len(images(drawn["slices"])) == 4
    measured = np.asarray(images(drawn["slices"])[0][1])
    repeats = (measured[1:] == measured[:-1]).all(axis=1).mean()
    assert repeats > 0.7  # 5 mm slices on 1 mm rows: 4 of 5 rows repeat the one before


def test_before_and_after_share_one_window(tmp_path):
    """The same value has the same grey in both; the input's surroundings are dimmed."""
    files = node_files(tmp_path)
    flicker = make_reportlets(files, tmp_path / "f", prefix="sub-1", suffix="T1w")[0]
    planes = [(e.get("class"), np.asarray(p)) for e, p in images(flicker)][:6]
    for (_, new), (state, old) in zip(planes[::2], planes[1::2], strict=True):
        assert state == "before"
        assert np.median(new[new > 0]) == np.median(old[new > 0])


def test_the_filled_scan_is_shown_through_the_middle_of_the_lesion(tmp_path):
    files = node_files(tmp_path)
    scan = nb.load(files["scan"])
    lesion = np.zeros(scan.shape, np.float32)
    lesion[18:24, 30:38, 10:13] = 1
    for role, array in (
        ("hidden", lesion),
        ("filled", np.where(lesion > 0, 50, scan.get_fdata()).astype(np.float32)),
    ):
        files[role] = tmp_path / f"{role}.nii.gz"
        nb.save(nb.Nifti1Image(array, scan.affine), files[role])
    output = make_reportlets(files, tmp_path / "f", prefix="sub-1", suffix="T1w")
    (mask,) = (path.read_text() for path in output if "desc-mask" in path.name)
    assert "Through the lesion mask" in mask
    assert mask.count("#ff8a65") >= 3
    flicker = output[0]
    text = flicker.read_text()
    assert "filled under the lesion mask" in text
    assert "#ff8a65" in text
    middle = scan.affine @ (20.5, 33.5, 11, 1)
    for axis, letter in enumerate("xyz"):
        result = re.search(rf"{letter} = ([+\u2212]?)(\d+) mm", text)
        sign = -1 if result[1] == "\u2212" else 1
        assert abs(sign * int(result[2]) - middle[axis]) < 2.5
    axial_new, axial_old = (np.asarray(p.convert("L"), float) for _, p in images(flicker)[4:6])
    inside = axial_old - axial_new > 20  # darker by the fill, and by nothing else
    assert 0.5 * 12 * 16 < inside.sum() * 100 * 124 / inside.size < 2.5 * 12 * 16


def test_tissues_are_measured_on_each_images_own_voxels(tmp_path):
    """In the scan divided by its bias field, without the lesion; not in an inpainted scan."""
    files = node_files(tmp_path)
    scan, restored = nb.load(files["scan"]), nb.load(files["restored"])
    noise = np.random.default_rng(0).normal(0, 2, scan.shape).astype(np.float32)
    field = nb.load(files["log_bias"]).get_fdata()
    flat = 100 + noise
    nb.save(nb.Nifti1Image((flat * np.exp(field)).astype(np.float32), scan.affine), files["scan"])
    speckle = np.random.default_rng(1).normal(100, 1, restored.shape).astype(np.float32)
    nb.save(nb.Nifti1Image(speckle, restored.affine), files["restored"])
    result = tissues_record(files)
    # labels 3 and 42 only: the cortex alone
    assert result.input["snr_gm"] == pytest.approx(50, rel=0.1)
    assert result.restored["snr_gm"] == pytest.approx(100, rel=0.05)
    assert set(result.restored) == {"snr_gm", "summary_gm_median", "summary_gm_stdv"}
    lesion = np.zeros(scan.shape, np.float32)
    lesion[: scan.shape[0] // 2] = 1
    files["hidden"] = tmp_path / "hidden.nii.gz"
    nb.save(nb.Nifti1Image(lesion, scan.affine), files["hidden"])
    bright = (flat + 1000 * lesion) * np.exp(field)
    nb.save(nb.Nifti1Image(bright.astype(np.float32), scan.affine), files["scan"])
    assert tissues_record(files).input["snr_gm"] == pytest.approx(50, rel=0.1)
    assert tissues_record({**files, "filled": files["scan"]}) is None
    paths = make_reportlets(
        {**files, "filled": files["scan"]}, tmp_path / "f", prefix="sub-1", suffix="T1w"
    )
    assert not any("desc-tissues" in path.name for path in paths)


def reportlets(files, **options):
    """The node."""
    roles = {"conform": "conform_json", "structures_table": "structures_json",
             "affine": "affine_json", "restore": "restore_json", "gains": "bias_json"}  # fmt: skip
    inputs = {roles.get(role, role): str(path) for role, path in files.items()}
    return Reportlets(name="sub-1_T1w", image=inputs["restored"], **inputs, **options)


def test_the_node_writes_pictures_and_metrics(tmp_path, monkeypatch):
    files = node_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    outputs = reportlets(files, viewer=False).run().outputs
    assert len(outputs.figures) == len(REPORTLETS)
    result = TissuesRecord.read(outputs.tissues_json)
    assert result == tissues_record(files)
    assert result.restored["snr_gm"] > 0


def test_a_page_that_fails_costs_no_picture(tmp_path, monkeypatch):
    files = node_files(tmp_path)
    del files["uncertainty"]
    monkeypatch.chdir(tmp_path)
    node = reportlets(files)
    outputs = node.run().outputs
    names = [Path(path).name for path in outputs.figures]
    assert names[-1] == "sub-1_desc-viewer_T1w.html"
    page = Path(outputs.figures[-1])
    page.unlink()
    page.mkdir()  # no file can be written there
    again = node.run().outputs
    assert [Path(path).name for path in again.figures] == names[:-1]
    (warning,) = json.loads(Path(again.record).read_text())["warnings"]
    assert "the viewer's pages could not be drawn" in warning


def test_the_histograms_of_tissues_have_two_panels_and_a_legend(drawn):
    text = drawn["tissues"].read_text()
    assert "input, without bias field" in text
    assert "cortex" in text
    assert "white matter" not in text  # the synthetic head has none


def test_without_uncertainty_there_is_no_such_picture(tmp_path):
    files = node_files(tmp_path)
    del files["uncertainty"], files["residual"]
    names = [p.name for p in make_reportlets(files, tmp_path / "f", prefix="sub-1", suffix="T1w")]
    assert not any("uncertainty" in name or "residual" in name for name in names)
    assert len(names) == len(REPORTLETS) - 2


def test_a_required_image_is_missing(tmp_path):
    with pytest.raises(KeyError, match="'restored' is required"):
        make_reportlets({"scan": tmp_path, "mask": tmp_path}, tmp_path, prefix="s", suffix="T1w")


def test_the_same_files_make_the_same_bytes(tmp_path, drawn):
    files = node_files(tmp_path)
    again = make_reportlets(files, tmp_path / "f", prefix="sub-01_run-02", suffix="T2w")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in drawn.values()]


def test_structures_keep_their_sides(drawn):
    """The left half has the brighter colour and is on the left."""
    overlay = images(drawn["structures"])[1][1]  # axial, over its grey picture
    rgb = np.asarray(overlay.convert("RGBA")).astype(int)
    shown = rgb[..., 3] > 0
    columns = np.broadcast_to(np.arange(shown.shape[1]), shown.shape)
    bright = shown & (rgb[..., 0] > 170)
    dark = shown & (rgb[..., 0] < 170)
    assert columns[bright].max() < columns[dark].min() + 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_position_of_a_section(axis):
    """On upright axes the coordinate is the affine's own; on tilted ones that of the centre."""
    rng = np.random.default_rng(axis)
    rotation = Rotation.from_euler("xyz", rng.uniform(-20, 20, 3), degrees=True).as_matrix()
    for turn in (np.eye(3), rotation):
        affine = np.eye(4)
        affine[:3, :3] = turn @ np.diag([1.0, 2.0, 3.0])
        affine[:3, 3] = rng.uniform(-100, 100, 3)
        volume = volumes.Volume(np.zeros((20, 21, 22), np.float32), affine)
        centre = np.array([9.5, 10.0, 10.5])
        centre[axis] = 7
        expected = (affine[:3, :3] @ centre + affine[:3, 3])[axis]
        assert volumes.section(volume, axis, 7).position_mm == pytest.approx(expected)


def test_spread_and_box():
    mask = np.zeros((40, 50, 60), np.float32)
    mask[10:20, 5:45, 30:33] = 1
    volume = volumes.Volume(mask, np.diag([1.0, 1.0, 4.0, 1.0]))
    assert volumes.bounding_box(volume, 6.0) == ((4, 26), (0, 50), (28, 35))
    assert volumes.spread(volume, 0, 1) == [15]
    assert volumes.spread(volume, 1, 3) == [15, 25, 35]
    empty = volume.like(np.zeros_like(mask))
    assert volumes.bounding_box(empty, 1.0) == ((0, 40), (0, 50), (0, 60))


def test_regrid_to_the_same_place():
    """A linear ramp keeps its values in mm, from a coarse to the 1 mm grid."""
    grid = Grid((12, 14, 6), np.diag([2.0, 2.0, 5.0, 1.0]))
    fine = grid.one_millimetre()
    ramp = grid.points_mm()[0]
    coarse = volumes.Volume(ramp, grid.affine)
    target = volumes.Volume(np.zeros(fine.shape, np.float32), fine.affine)
    got = coarse.regrid(target, order=1).data
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(got[inner], fine.points_mm()[0][inner], atol=1e-4)


def test_values_that_are_not_finite_read_zero(tmp_path):
    data = np.ones((4, 4, 4), np.float32)
    data[0, 0, 0], data[1, 1, 1] = np.nan, np.inf
    nb.save(nb.Nifti1Image(data, np.eye(4)), tmp_path / "x.nii")
    loaded = volumes.load_volume(tmp_path / "x.nii").data
    assert loaded[0, 0, 0] == loaded[1, 1, 1] == 0
    assert loaded.sum() == 62


# ---- the viewer's pages -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def viewers(tmp_path_factory, reference):
    """Files of the nodes, and what -> page."""
    folder = tmp_path_factory.mktemp("viewers")
    files = node_files(folder / "nodes")
    pages = make_viewers(files, folder / "figures", prefix="sub-01_run-02", suffix="T2w")
    return files, {re.search("_desc-([A-Za-z]+)_", path.name)[1]: path for path in pages}


def mosaics(page):
    """Grey values and opacity of the result and of the layer above it."""
    result = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    pictures = [Image.open(io.BytesIO(base64.b64decode(content))) for content in result]
    return [np.asarray(picture.convert("LA"), float) for picture in (pictures[0], pictures[-1])]


def test_the_pages_need_no_network(viewers):
    _, pages = viewers
    assert list(pages) == ["viewer", "viewerUncertainty"]
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", text)
        assert "sub-01_run-02_T2w" in text


def test_a_page_has_a_heading_a_note_a_labelled_slider_and_a_way_back(viewers):
    files, pages = viewers
    white = ScanImages(files).window[1]
    expected = {
        "viewer": ("Input over result", "Opacity of the input, %", "100", "same grey window"),
        "viewerUncertainty": (
            "Uncertainty (SD) over result",
            "Opacity of the colours, %",
            "50",  # as drawn at first
            f"displayed as white ({white:.4g} in the units of the scan; this is not the value",
        ),
    }
    for what, (title, words, opacity, note) in expected.items():
        page = html.parse(str(pages[what])).getroot()
        assert page.get("lang") == "en"
        (main,) = page.xpath("//body/*")
        assert main.tag == "main"
        assert [head.text for head in page.xpath("//h1")] == [f"{title} · sub-01_run-02_T2w"]
        assert page.xpath("//title/text()") == [f"{title} · sub-01_run-02_T2w"]
        (slider,) = page.xpath("//input")
        (label,) = page.xpath("//label")
        assert (label.get("for"), label.text) == (slider.get("id"), words)
        assert slider.get("value") == opacity == page.xpath("//span/text()")[0]
        assert note in page.xpath("string(//main)")
        assert page.xpath("//a/@href") == ["../../sub-01.html#sub-01_run-02_T2w"]
        assert page.xpath("//canvas/@aria-label")[0].startswith(title)


def test_without_javascript_a_page_says_so_and_shows_no_sprites(viewers):
    _, pages = viewers
    for path in pages.values():
        page = html.parse(str(path)).getroot()
        assert "need JavaScript" in page.xpath("string(//noscript)")
        (planes,) = page.xpath("//div[@id='planes']")
        assert planes.get("hidden") is not None  # until the script shows them
        assert not page.xpath("//img[not(ancestor::div[@id='planes'])]")


def test_the_page_of_another_task_leads_to_that_task(tmp_path):
    files = node_files(tmp_path / "nodes")
    (page, _) = make_viewers(files, tmp_path, prefix="sub-1", suffix="T1w", image="inpainted")
    text = page.read_text(encoding="utf-8")
    assert "../../sub-1.html#sub-1_desc-inpainted_T1w" in text


def test_a_change_of_nilearns_page_is_reported(viewers, tmp_path, monkeypatch):
    """A slider without a label would go unnoticed."""
    page = SimpleNamespace(get_standalone=lambda: "<html><body><canvas ></canvas></body></html>")
    monkeypatch.setattr(viewer.plotting, "view_img", lambda *_, **__: page)
    with pytest.raises(RuntimeError, match="nilearn's page has no <p>Opacity"):
        make_viewers(viewers[0], tmp_path, prefix="sub-1", suffix="T1w")


def test_input_result_and_uncertainty_lie_over_one_another(viewers):
    """The numbers of bright and coloured pixels of each layer match the numbers of voxels."""
    files, pages = viewers
    restored = nb.load(files["restored"]).get_fdata()
    mask = nb.load(files["mask"]).get_fdata() > 0.5
    result, before = mosaics(pages["viewer"])
    assert result.shape == before.shape
    inside = (result[..., 0] > 0).sum()
    assert inside == pytest.approx((restored > 0.004 * restored.max()).sum(), rel=0.03)
    assert ((before[..., 1] > 0) & (before[..., 0] > 2)).sum() > inside  # the input has a skull
    _, sd = mosaics(pages["viewerUncertainty"])
    images = ScanImages(files)
    share = images.load("uncertainty").data * (100 / images.window[1])
    coloured = ((sd[..., 1] > 0) & (sd[..., 0] > 2)).sum()  # unused tiles are opaque, and 0
    assert 0 < coloured == pytest.approx((share >= UNCERTAIN_PERCENT[0]).sum(), rel=0.03)
    assert coloured < mask.sum() * 1.03


@pytest.mark.parametrize("extend", [True, False])
def test_an_image_on_a_tilted_grid_keeps_its_values_and_ends_with_its_field_of_view(extend):
    shape, affine = (20, 24, 8), np.diag([1.0, 1.0, 3.0, 1.0])
    ramp = (np.indices(shape) * np.array([1.0, 2.0, 9.0])[:, None, None, None]).sum(0)
    tilted = np.eye(4)
    tilted[:3, :3] = Rotation.from_euler("xyz", (20, 10, -15), degrees=True).as_matrix()
    target = volumes.Volume(np.zeros((30, 30, 30), np.float32), tilted)
    placed = volumes.Volume(ramp.astype(np.float32), affine).regrid(target, 1, extend=extend)
    mm = np.einsum("ab,bijk->aijk", tilted[:3, :3], np.indices(target.data.shape))
    last = (np.array(shape) - 1) * np.diag(affine)[:3]
    inside = ((mm >= 0) & (mm <= last[:, None, None, None])).all(0)
    away = ((mm < -3) | (mm > last[:, None, None, None] + 3)).any(0)
    expected = mm[0] + 2 * mm[1] + 3 * mm[2]
    np.testing.assert_allclose(placed.data[inside], expected[inside], atol=1e-3)
    assert inside.any()
    assert away.any()
    assert (placed.data[away] > 0).any() == extend

# SPDX-License-Identifier: Apache-2.0
"""The graph of a run, and the files that --dry-run lists."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from brainprior_bids.workflows.base import init_brainprior_wf
from brainprior_bids.workflows.scan import (
    EXPORT_NODES,
    NODES,
    Job,
    claims_gb,
    expected_work,
)
from templates import SPACE, paths_of, write_template

from brainprior_bids.bids.contrasts import Result
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.given import Given
from brainprior_bids.bids.names import scan_seed
from brainprior_bids.bids.query import find_scans
from brainprior_bids.run.jobs import look_up, template_sha256, via_t1w
from brainprior_bids.run.plan import contrast_names
from brainprior_bids.settings import TASKS, Settings

SKELETON = [
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_acq-thick_run-1_T2w.nii.gz",
    "sub-01/anat/sub-01_acq-thick_run-2_T2w.nii.gz",
    "sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii",
    "sub-02/ses-b/anat/sub-02_ses-b_FLAIR.nii",
]
GOLDEN = """\
sub-01/anat/sub-01_acq-thick_run-1_from-T1w_to-T2w_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-1_from-T2w_to-T1w_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-2_from-T1w_to-T2w_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-2_from-T2w_to-T1w_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-1_mod-T2w_desc-restored_residual.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_desc-restored_T2w.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_mod-T2w_desc-restored_uncertainty.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_from-MNI305_to-T2w_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-1_from-T2w_to-MNI305_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-1_space-MNI305_desc-restored_T2w.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_space-MNI305_desc-brainT2w_mask.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_space-MNI305_desc-structuresT2w_dseg.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_space-MNI305_desc-structuresT2w_dseg.tsv
sub-01/anat/sub-01_acq-thick_run-1_mod-T2w_space-MNI305_desc-restored_uncertainty.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_space-T2w_desc-brain_mask.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_space-T2w_desc-structures_dseg.nii.gz
sub-01/anat/sub-01_acq-thick_run-1_space-T2w_desc-structures_dseg.tsv
sub-01/anat/sub-01_acq-thick_run-2_mod-T2w_desc-restored_residual.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_desc-restored_T2w.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_mod-T2w_desc-restored_uncertainty.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_from-MNI305_to-T2w_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-2_from-T2w_to-MNI305_mode-image_xfm.txt
sub-01/anat/sub-01_acq-thick_run-2_space-MNI305_desc-restored_T2w.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_space-MNI305_desc-brainT2w_mask.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_space-MNI305_desc-structuresT2w_dseg.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_space-MNI305_desc-structuresT2w_dseg.tsv
sub-01/anat/sub-01_acq-thick_run-2_mod-T2w_space-MNI305_desc-restored_uncertainty.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_space-T2w_desc-brain_mask.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_space-T2w_desc-structures_dseg.nii.gz
sub-01/anat/sub-01_acq-thick_run-2_space-T2w_desc-structures_dseg.tsv
sub-01/anat/sub-01_desc-brain_mask.nii.gz
sub-01/anat/sub-01_mod-T1w_desc-restored_residual.nii.gz
sub-01/anat/sub-01_desc-restored_T1w.nii.gz
sub-01/anat/sub-01_desc-structures_dseg.nii.gz
sub-01/anat/sub-01_desc-structures_dseg.tsv
sub-01/anat/sub-01_mod-T1w_desc-restored_uncertainty.nii.gz
sub-01/anat/sub-01_from-MNI305_to-T1w_mode-image_xfm.txt
sub-01/anat/sub-01_from-T1w_to-MNI305_mode-image_xfm.txt
sub-01/anat/sub-01_space-MNI305_desc-restored_T1w.nii.gz
sub-01/anat/sub-01_space-MNI305_desc-brain_mask.nii.gz
sub-01/anat/sub-01_space-MNI305_desc-structures_dseg.nii.gz
sub-01/anat/sub-01_space-MNI305_desc-structures_dseg.tsv
sub-01/anat/sub-01_mod-T1w_space-MNI305_desc-restored_uncertainty.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_mod-FLAIR_desc-restored_residual.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_desc-restored_FLAIR.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_mod-FLAIR_desc-restored_uncertainty.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_from-FLAIR_to-MNI305_mode-image_xfm.txt
sub-02/ses-a/anat/sub-02_ses-a_from-MNI305_to-FLAIR_mode-image_xfm.txt
sub-02/ses-a/anat/sub-02_ses-a_space-FLAIR_desc-brain_mask.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_space-FLAIR_desc-structures_dseg.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_space-FLAIR_desc-structures_dseg.tsv
sub-02/ses-a/anat/sub-02_ses-a_space-MNI305_desc-restored_FLAIR.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_space-MNI305_desc-brainFLAIR_mask.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_space-MNI305_desc-structuresFLAIR_dseg.nii.gz
sub-02/ses-a/anat/sub-02_ses-a_space-MNI305_desc-structuresFLAIR_dseg.tsv
sub-02/ses-a/anat/sub-02_ses-a_mod-FLAIR_space-MNI305_desc-restored_uncertainty.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_mod-FLAIR_desc-restored_residual.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_desc-restored_FLAIR.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_mod-FLAIR_desc-restored_uncertainty.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_from-FLAIR_to-MNI305_mode-image_xfm.txt
sub-02/ses-b/anat/sub-02_ses-b_from-MNI305_to-FLAIR_mode-image_xfm.txt
sub-02/ses-b/anat/sub-02_ses-b_space-FLAIR_desc-brain_mask.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_space-FLAIR_desc-structures_dseg.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_space-FLAIR_desc-structures_dseg.tsv
sub-02/ses-b/anat/sub-02_ses-b_space-MNI305_desc-restored_FLAIR.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_space-MNI305_desc-brainFLAIR_mask.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_space-MNI305_desc-structuresFLAIR_dseg.nii.gz
sub-02/ses-b/anat/sub-02_ses-b_space-MNI305_desc-structuresFLAIR_dseg.tsv
sub-02/ses-b/anat/sub-02_ses-b_mod-FLAIR_space-MNI305_desc-restored_uncertainty.nii.gz
""".splitlines()


@pytest.fixture
def raw(tmp_path):
    root = tmp_path / "raw"
    for name in SKELETON:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), "uint8"), np.diag([1, 1, 4, 1])), path)
    (root / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return root


def build(settings: Settings, tmp_path: Path):
    weights = tmp_path / "weights"
    weights.touch()
    jobs = [
        Job(scan, scan_seed(settings.random_seed, scan.name), "f" * 64)
        for scan in find_scans(settings)
    ]
    return init_brainprior_wf(jobs=jobs, settings=settings, prior=weights, parcellation=weights)


def by_step(workflow):
    steps: dict[str, list] = {}
    for node in sorted(workflow._get_all_nodes(), key=lambda node: node.fullname):
        steps.setdefault(node.name, []).append(node)
    return steps


def test_a_dry_run_announces_the_golden_tree(raw, tmp_path):
    """With the interpretation of each scan, and the reason if its header cannot be used."""
    series = raw / "sub-02" / "ses-b" / "anat" / "sub-02_ses-b_T2w.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 7, 2), "uint8"), np.diag([1, 1, 4, 1])), series)
    given = [str(raw), str(tmp_path / "out"), "participant", "--dry-run", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "brainprior_bids", *given],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = [line.strip() for line in done.stdout.splitlines() if line.startswith("  sub-")]
    assert sorted(listed) == sorted(GOLDEN)
    taken = "9 × 8 × 7 voxels of 1 × 1 × 4 mm; axial slices, 4 mm thick (header slice spacing)"
    assert done.stdout.count(taken) == len(SKELETON)
    assert done.stdout.count("warning: sub-01_T1w: no SliceThickness in any JSON") == 1
    assert "would fail: sub-02_ses-b_T2w: expected one 3-D volume, got 2" in done.stdout
    assert "6 scan(s), of which 1 would fail" in done.stdout
    assert not (tmp_path / "out").exists()


def sources_of(workflow, step):
    """Input of a step -> (step, output) that it comes from."""
    graph = workflow._create_flat_graph()
    (target,) = (node for node in graph if node.name == step)
    return {
        name: (source.name, output)
        for source, _, data in graph.in_edges(target, data=True)
        for output, name in data["connect"]
    }


@pytest.mark.parametrize(
    ("task", "fused"),
    # refine alone is not fused: no scan takes part
    [*((task, False) for task in TASKS), *((task, True) for task in TASKS if task != "refine")],
)
def test_every_combination_of_tasks_has_its_graph(raw, tmp_path, task, fused):
    """Inpainting masks N4 and the alignment; another tool's image alone replaces the scan."""
    file = tmp_path / "file.nii"
    file.touch()
    settings = Settings(
        raw, tmp_path / "out", tmp_path / "work", task=task, trust="0.1", dilate_mm=2.0,
        fuse="runs" if fused else None,
    )  # fmt: skip
    words = task.split("+")
    role_of = {"inpaint": "lesion", "refine": "refined"}
    given = {role_of[w]: Given(file, f"bids:x:{w}") for w in words if w in role_of}
    t2w = [scan for scan in find_scans(settings) if scan.name.suffix == "T2w"]
    scan = fuse_runs(t2w)[0] if fused else t2w[0]
    lesion = {role: result for role, result in given.items() if role == "lesion"}
    others = [(run, lesion) for run in scan.runs[1:]]
    parts = {run.name.stem: "0" * 64 for run in scan.runs[1:]}
    job = Job(scan, 0, "f" * 64, given, (), others, parts)
    workflow = init_brainprior_wf(jobs=[job], settings=settings, prior=file, parcellation=file)
    steps = by_step(workflow)
    assert set(steps) - {"records"} == set(expected_work(settings))
    restore, conform = steps["restore"][0].inputs, steps["conform"][0].inputs
    assert (conform.in_file == str(file)) == (task == "refine")
    assert restore.keep_scan == ("restore" not in words and "inpaint" in words)
    assert (restore.refined == str(file)) == ("refine" in words and len(words) > 1)
    assert (restore.trust == 0.1) == ("refine" in words)
    recorded = steps["write"][0].inputs.given
    assert {role: recorded[role]["uri"] for role in given} == {r: g.uri for r, g in given.items()}
    if task != "refine":  # hidden voxels are excluded from the bias field and from the likelihood
        masked = ("lesion", "measured") if "inpaint" in words else ("parcellate", "mask_scan")
        assert sources_of(workflow, "n4")["mask_scan"] == masked
    links = sources_of(workflow, "restore")
    brain = "lesion" if "inpaint" in words else "parcellate"
    assert links["mask_scan"] == (brain, "mask_scan")
    assert links["mask"] == (("align" if fused else brain), "mask")
    assert links.get("hidden") == (("lesion", "hidden") if "inpaint" in words else None)
    assert ("runs_json" in links) == fused
    if fused:
        links, (run,) = sources_of(workflow, "align"), steps["align"][0].inputs.runs
        assert links["mask"] == (brain, "mask")
        assert ("hidden" in links) == ("lesion" in run) == ("inpaint" in words)
        if "inpaint" in words:
            assert run["lesion"] == {"lesion": str(file), "dilate_mm": 2.0}
            assert recorded[f"lesion of {run['name']}"]["uri"] == "bids:x:inpaint"
        assert run["hashes"] == parts


def test_a_lesion_mask_of_another_run_alone_is_used(raw, tmp_path):
    file = tmp_path / "file.nii"
    file.touch()
    settings = Settings(
        raw, tmp_path / "out", tmp_path / "work", task="restore+inpaint", fuse="runs"
    )
    scan = fuse_runs([scan for scan in find_scans(settings) if scan.name.suffix == "T2w"])[0]
    others = [(run, {"lesion": Given(file, "bids:x:lesion")}) for run in scan.runs[1:]]
    job = Job(scan, 0, "f" * 64, {}, (), others)
    workflow = init_brainprior_wf(jobs=[job], settings=settings, prior=file, parcellation=file)
    assert "lesion" not in by_step(workflow)
    assert "hidden" not in sources_of(workflow, "restore")
    assert "lesion" in by_step(workflow)["align"][0].inputs.runs[0]


def test_every_scan_goes_its_own_way_through_every_step(raw, tmp_path):
    workflow = build(Settings(raw, tmp_path / "out", tmp_path / "work"), tmp_path)
    steps = by_step(workflow)
    assert set(steps) == {*NODES, "records"} - {"lesion", "align", "templates", *EXPORT_NODES}
    assert {len(nodes) for nodes in steps.values()} == {len(SKELETON)}
    graph = workflow._create_flat_graph()
    import networkx as nx

    assert nx.number_weakly_connected_components(graph) == len(SKELETON)
    for component in nx.weakly_connected_components(graph):
        order = [n.name for n in nx.topological_sort(graph.subgraph(component))]
        assert order[0] == "conform"
        assert order[-1] == "write"


def test_what_the_options_say_of_the_scan_reaches_its_nodes(raw, tmp_path):
    plain = Settings(raw, tmp_path / "out", tmp_path / "work")
    asked = replace(
        plain,
        slice_plane="coronal",
        slice_thickness_mm=4.0,
        field_strength_t=0.55,
        effective_resolution="0,5,0",
    )
    steps = by_step(build(asked, tmp_path))
    for node in steps["conform"]:
        assert (node.inputs.slice_plane, node.inputs.slice_thickness) == ("coronal", 4.0)
        assert node.inputs.effective_resolution == "0,5,0"
    for node in (*steps["conform"], *steps["write"]):
        assert node.inputs.metadata["MagneticFieldStrength"] == 0.55
    assert asked.scan_settings() != plain.scan_settings()


@pytest.mark.parametrize(("task", "spaces", "moved"), [
    ("restore", ("anat", "MNI305"), {"in_file", "uncertainty", "samples", "mask", "structures"}),
    ("inpaint", ("anat", "MNI305"), {"in_file", "mask", "structures"}),
    ("restore", ("anat",), {"in_file"}),
])  # fmt: skip
def test_what_is_resampled_to_mni305(raw, tmp_path, task, spaces, moved):
    """The result itself always: the report draws it."""
    settings = Settings(
        raw, tmp_path / "out", tmp_path / "work", task=task, output_spaces=spaces,
        modalities=("T1w",),
    )  # fmt: skip
    links = sources_of(build(settings, tmp_path), "mni305")
    assert set(links) - {"affine_json"} == moved


@pytest.mark.parametrize(("task", "moved"), [
    ("restore", {"in_file", "uncertainty", "samples", "mask", "structures"}),
    ("inpaint", {"in_file", "mask", "structures"}),
])  # fmt: skip
def test_a_template_has_a_node_where_the_scan_is_registered_to_it(
    raw, tmp_path, monkeypatch, task, moved
):
    write_template(tmp_path / "templates", np.ones((3, 3, 3)), np.eye(4))
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "templates"))
    settings = Settings(
        raw, tmp_path / "out", tmp_path / "work", task=task, modalities=("T1w",),
        output_spaces=("anat", SPACE), omp_nthreads=3,
    )  # fmt: skip
    (scan,) = find_scans(settings)
    (tmp_path / "weights").touch()
    parts = {"prior": tmp_path / "weights", "parcellation": tmp_path / "weights"}
    job = Job(scan, 0, "f" * 64, templates=(SPACE,))
    workflow = init_brainprior_wf(jobs=[job], settings=settings, **parts)
    links = sources_of(workflow, "templates")
    assert set(links) - {"affine_json"} == moved
    (node,) = by_step(workflow)["templates"]
    assert (node.n_procs, node.inputs.brain_only) == (3, task == "inpaint")
    assert [Path(p) for p in (*node.inputs.images, *node.inputs.masks)] == list(
        paths_of(tmp_path / "templates")
    )
    written = sources_of(workflow, "write")
    assert written["template_files"] == ("templates", "files")
    assert claims_gb(settings)["templates"] == node.mem_gb
    assert "templates" not in claims_gb(replace(settings, output_spaces=("anat",)))


def test_a_t2w_reaches_a_template_through_its_t1w(raw, tmp_path, monkeypatch):
    """In sub-02, which has no T1w, every FLAIR is registered itself."""
    write_template(tmp_path / "templates", np.ones((3, 3, 3)), np.eye(4))
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "templates"))
    settings = Settings(raw, tmp_path / "out", tmp_path / "work", output_spaces=("anat", SPACE))
    scans = find_scans(settings)
    through = via_t1w(scans, settings)
    assert through == {"sub-01_acq-thick_run-1_T2w", "sub-01_acq-thick_run-2_T2w"}
    result = {s.name.stem: look_up(s, settings, {}, via_t1w=s.name.stem in through) for s in scans}
    assert {stem for stem, one in result.items() if not one.templates} == through
    t1w, t2w = result["sub-01_T1w"], result["sub-01_acq-thick_run-1_T2w"]
    assert f"template {SPACE}" in t1w.parts
    assert t2w.parts["way to the templates"] == "through the T1w"
    announced = contrast_names(
        [(Result(s.name, "restored"), True) for s in scans], settings, through
    )
    at = f"sub-01/anat/sub-01_acq-thick_run-1_space-{SPACE}_res-1_desc-restored_T2w.nii.gz"
    assert at in announced
    assert not any("sub-02" in name and SPACE in name for name in announced)
    assert via_t1w(scans, replace(settings, task="inpaint")) == set()
    assert via_t1w(scans, replace(settings, output_spaces=("anat", "MNI305"))) == set()
    # a template that changed changes the result
    write_template(tmp_path / "templates", np.ones((3, 3, 3)) * 2, np.eye(4))
    template_sha256.cache_clear()
    t1w_scan = next(s for s in scans if s.name.stem == "sub-01_T1w")
    assert look_up(t1w_scan, settings, {}).fingerprint != t1w.fingerprint


def test_restore_is_a_gpu_node_only_on_cuda(raw, tmp_path):
    settings = Settings(raw, tmp_path / "out", tmp_path / "work", omp_nthreads=3, device="cpu")
    on_cpu = by_step(build(settings, tmp_path))
    assert not any(node.is_gpu_node() for nodes in on_cpu.values() for node in nodes)
    assert {node.n_procs for node in on_cpu["restore"]} == {3}
    on_gpu = by_step(build(replace(settings, device="cuda:1"), tmp_path))
    gpu_steps = {name for name, nodes in on_gpu.items() if any(n.is_gpu_node() for n in nodes)}
    assert gpu_steps == {"restore"}
    assert {node.n_procs for node in on_gpu["restore"]} == {1}
    assert {node.inputs.device for node in on_gpu["restore"]} == {"cuda:1"}


def test_low_memory_runs_the_prior_in_tiles(raw, tmp_path):
    settings = Settings(raw, tmp_path / "out", tmp_path / "work", low_mem=True)
    tiles = {node.inputs.tile_mm for node in by_step(build(settings, tmp_path))["restore"]}
    assert tiles == {32}


def test_what_a_restoration_claims_depends_on_tiles_and_samples(raw, tmp_path):
    def claim(**given):
        settings = Settings(raw, tmp_path / "out", tmp_path / "work", **given)
        return by_step(build(settings, tmp_path))["restore"][0].mem_gb

    assert claim(low_mem=True) < claim() == claim(n_samples=1) < claim(n_samples=8)


def test_a_wide_field_of_view_claims_more_memory(raw, tmp_path):
    settings = Settings(raw, tmp_path / "out", tmp_path / "work")
    image = nib.Nifti1Image(np.zeros((4, 4, 3), np.uint8), np.diag([100.0, 105.0, 100.0, 1]))
    nib.save(image, raw / SKELETON[0])
    claims = sorted(node.mem_gb for node in by_step(build(settings, tmp_path))["parcellate"])
    assert claims == pytest.approx([2.0] * 4 + [0.9 + 0.075 * 50.4])  # of 400 x 420 x 300 mm


def test_seeds_differ_between_scans_and_come_from_the_run(raw, tmp_path):
    settings = Settings(raw, tmp_path / "out", tmp_path / "work", random_seed=5)
    seeds = [node.inputs.seed for node in by_step(build(settings, tmp_path))["restore"]]
    assert len(set(seeds)) == len(SKELETON)
    again = [node.inputs.seed for node in by_step(build(settings, tmp_path))["restore"]]
    assert seeds == again


def test_how_it_is_computed_does_not_make_a_result_stale(raw, tmp_path):
    settings = Settings(raw, tmp_path / "out", tmp_path / "work", omp_nthreads=1, device="cpu")

    def digest(settings):
        node = by_step(build(settings, tmp_path))["restore"][0]
        return node.inputs.get_hashval(hash_method="content")[1]

    assert digest(settings) == digest(replace(settings, omp_nthreads=4, device="cuda:0"))
    assert digest(settings) != digest(replace(settings, n_samples=5))
    assert digest(settings) != digest(replace(settings, random_seed=1))

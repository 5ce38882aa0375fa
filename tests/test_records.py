# SPDX-License-Identifier: Apache-2.0
"""Records: round trip, old and partial files, messages about wrong types."""

from __future__ import annotations

import dataclasses
import inspect
import json
import random
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from brainprior_bids import records
from brainprior_bids.bids.files import to_json
from brainprior_bids.engine.errors import RecordError, ShapeMismatchError
from brainprior_bids.records import (
    AffineMethod,
    AffineRecord,
    ConformRecord,
    ErrorRecord,
    MaskSource,
    NodeRecord,
    Origin,
    ParcellationRecord,
    RestoreRecord,
    RunRecord,
    ScanRecord,
    ScanStatus,
    StepRecords,
    StructuresSource,
    matrix_rows,
    named,
    unnamed,
)
from brainprior_bids.settings import PARCELLATIONS, SKULL_STRIPS
from brainprior_bids.typed_json import Record

KINDS = sorted(
    (
        kind
        for _, kind in inspect.getmembers(records, inspect.isclass)
        if issubclass(kind, Record) and kind is not Record
    ),
    key=lambda kind: kind.__name__,
)


def value_of(kind: Any, draw: random.Random) -> Any:
    """Some value of a field's type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return value_of(draw.choice(arguments), draw)
    if origin is tuple:
        many = (arguments[0],) * draw.randrange(3) if arguments[-1] is Ellipsis else arguments
        return tuple(value_of(member, draw) for member in many)
    if origin is Mapping:
        return {word(draw): value_of(arguments[1], draw) for _ in range(draw.randrange(3))}
    if kind is NoneType:
        return None
    if kind in (str, Any):
        return word(draw)
    if kind in (int, float, bool):
        return {int: draw.randrange(2**63), float: draw.gauss(0, 1e6), bool: draw.random() < 0.5}[
            kind
        ]
    if issubclass(kind, StrEnum):
        return draw.choice(list(kind))
    return record_of(kind, draw)


def word(draw: random.Random) -> str:
    return "".join(draw.choices('aé\n"-: ', k=4))


def record_of(kind: type[Record], draw: random.Random) -> Record:
    hints = get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    return kind(**{name: value_of(hints[name], draw) for name in names})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_written_is_read_back(kind):
    draw = random.Random(kind.__name__)
    for _ in range(20):
        record = record_of(kind, draw)
        assert kind.from_json(json.loads(to_json(record.to_json()))) == record


FULL = RestoreRecord(
    sampler="conditional", sampler_reason=None, contrast="T1w", n_samples=2, seed=2**62 + 1,
    schedule=(3.0, 0.0), calls=20, tile_mm=None, sample_seeds=(1, 2), slice_widths=(1.0, 1.17),
    inner_iterations=0.0, rim_mm=1.5, box=None, noise_sd_initial=0.02, noise_sd=0.021,
    residual_ratios=(1.0, 1.1), residual_ratios_final=(1.0, 1.0),
    residual_correlation=((0.0, 0.1, 0.2),) * 2, bias_range=1.2, share_beyond_3_sd=0.003,
    unit=500.0, seconds=9.0, acquisition=records.AcquisitionRecord.empty(),
    environment=records.EnvironmentRecord.empty(), prior=records.WeightsRecord(sha256="0" * 64),
    warnings=("doubtful",),
)  # fmt: skip


def test_what_does_not_apply_is_not_written_and_what_is_unknown_is_null():
    values = FULL.to_json()
    assert not {"runs", "refined", "changed_share"} & set(values)
    assert values["tile_mm"] is None
    assert values["prior"] == {"name": None, "sha256": "0" * 64}
    assert ScanRecord(scan="sub-1_T1w", subject="1").to_json()["facts"] == {}


def test_a_record_is_constructed_with_all_that_it_holds():
    with pytest.raises(TypeError, match="feather_mm"):
        records.ExportRecord(gain=1.0, warnings=())


@pytest.mark.parametrize("values", [{}, {"facts": {}}, {"facts": {"restore": {}, "affine": {}}}])
def test_a_summary_with_little_in_it_reads_as_not_recorded(values):
    summary = ScanRecord.from_json({"scan": "sub-1_T1w", **values})
    restore, conform = summary.facts.restore, summary.facts.conform
    assert restore.noise_sd is None
    assert restore.scanner_units(0.1) is None
    assert restore.residual_ratios == ()
    assert restore.environment.gpu is None
    assert conform.facts.grid.spacing_mm == ()
    assert conform.facts.acquisition.field_strength_t is None
    assert summary.facts.parcellation.mask_origin.embedded
    assert summary.facts.affine.method is AffineMethod.STRUCTURES
    assert summary.facts.networks == {}
    assert summary.peak_memory_gb is None
    assert not summary.finished


def test_keys_of_other_versions_are_ignored():
    values = {**FULL.to_json(), "colour": "red"}
    values["prior"]["flavour"] = ["sweet"]
    assert RestoreRecord.from_json(values) == FULL
    assert "colour" not in RestoreRecord.from_json(values).to_json()


def test_what_older_versions_wrote_is_read():
    old = {**FULL.to_json(), "not_eps": "3-D scan with a hole"}
    del old["sampler_reason"]
    assert RestoreRecord.from_json(old).sampler_reason == "3-D scan with a hole"
    assert "not_eps" not in RestoreRecord.from_json(old).to_json()
    assert RestoreRecord.from_json({**old, "sampler": "eps"}).sampler == "conditional"
    assert (
        AffineRecord.from_json({"method": "registration to the template"}).method
        is AffineMethod.TEMPLATE
    )


@pytest.mark.parametrize(
    ("old", "source", "stripped"),
    [
        ("embedded", MaskSource.EMBEDDED, False),
        ("the scan's own edge: it is already skull-stripped", MaskSource.OWN_EDGE, True),
        ("the scan's own edge (--skull-strip skip)", MaskSource.SKIP, True),
        ("SynthStrip", MaskSource.SYNTHSTRIP, False),
    ],
)
def test_mask_sources_used_to_be_sentences(old, source, stripped):
    record = ParcellationRecord.from_json({"mask_source": old})
    assert record.mask_source is source
    assert record.mask_source.scan_is_stripped is stripped
    assert record.given == {}
    assert ParcellationRecord.from_json(record.to_json()) == record


def test_files_used_to_be_their_own_source():
    uri = "bids:fs:sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    given = {"mask": {"uri": uri, "sha256": "12"}}
    old = {"mask_source": uri, "structures_source": "aseg.nii.gz", "given": given}
    record = ParcellationRecord.from_json(old)
    assert record.mask_origin == Origin(MaskSource.FILE, uri)
    assert record.given["mask"].sha256 == "12"
    assert record.mask_origin.words == uri
    assert record.mask_origin.data_set == "the data set fs"
    assert record.structures_origin == Origin(StructuresSource.FILE, "aseg.nii.gz")
    assert record.structures_origin.data_set == "aseg.nii.gz"
    assert given == {"mask": {"uri": uri, "sha256": "12"}}  # the caller's value is not changed


def test_every_option_is_a_source_and_every_source_has_its_words():
    assert set(SKULL_STRIPS) == set(MaskSource) - {MaskSource.OWN_EDGE}
    assert set(PARCELLATIONS) == set(StructuresSource)
    for kind in (MaskSource, StructuresSource, AffineMethod):
        assert len({member.words for member in kind}) == len(kind)
    before = Origin(MaskSource("mask"))  # a run that is only planned has no file yet
    assert before.words == before.data_set == "another data set (--derivatives)"


@pytest.mark.parametrize(
    ("kind", "values", "problem"),
    [
        (RestoreRecord, {"unit": "big"}, 'unit must be a number, got "big"'),
        (RestoreRecord, {"n_samples": 4.5}, "n_samples must be a whole number, got 4.5"),
        (RestoreRecord, {"n_samples": True}, "n_samples must be a whole number, got true"),
        (RestoreRecord, {"residual_ratios": 1.0}, "residual_ratios must be a list, got 1.0"),
        (
            RestoreRecord,
            {"residual_correlation": [[0, 0, 0], [0, None, 0]]},
            "residual_correlation[1][1] must be a number, got null",
        ),
        (RestoreRecord, {"runs": [{"name": "a"}, {}]}, "runs[1].name must be there"),
        (RestoreRecord, {"environment": {"tf32": 1}}, "environment.tf32 must be true or false"),
        (ConformRecord, {"acquisition": {"profile": 3}}, "acquisition.profile must be text"),
        (ConformRecord, {"facts": []}, "facts must be an object, got []"),
        (AffineRecord, {"matrix": [[1.0] * 4] * 3}, "matrix must be a list of 4, got 3"),
        (AffineRecord, {"method": "guess"}, "method must be one of structures, template"),
        (AffineRecord, {"residuals_mm": {"a": "far"}}, "residuals_mm.a must be a number"),
        (NodeRecord, {"warnings": "no"}, 'warnings must be a list, got "no"'),
        (ScanRecord, {"scan": "a", "status": "lost"}, "status must be one of done, skipped"),
        (ScanRecord, {"subject": "1"}, "scan must be there, but is missing"),
        (ScanRecord, ["a"], 'must be an object, got ["a"]'),
    ],
)
def test_a_wrong_type_is_named_with_file_and_key(tmp_path, kind, values, problem):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(values))
    with pytest.raises(RecordError) as caught:
        kind.read(path)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "run the scan again" in str(caught.value)


def test_what_is_no_json_is_named(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(RecordError, match=r"report\.json: not JSON"):
        NodeRecord.read(path)
    with pytest.raises(FileNotFoundError):
        NodeRecord.read(tmp_path / "none.json")


def test_numpy_is_read_as_what_it_holds():
    record = AffineRecord.from_json(
        {"matrix": np.eye(4), "dof": np.int64(12), "median_residual_mm": np.float32(0.5)}
    )
    assert record.matrix == matrix_rows(np.eye(4))
    assert type(record.dof) is int
    assert type(record.median_residual_mm) is float
    with pytest.raises(ShapeMismatchError, match="4 x 4"):
        matrix_rows(np.eye(3))


def test_a_measured_profile_is_pairs():
    pairs = [[-2.0, 0.0], [0.0, 1.0], [2.0, 0.0]]
    record = records.AcquisitionRecord.from_json({"profile": pairs})
    assert record.profile == ((-2.0, 0.0), (0.0, 1.0), (2.0, 0.0))
    assert record.to_json()["profile"] == pairs


def test_a_run_has_files_before_and_residuals_after_the_restoration():
    run = RunRecord.from_json({"name": "a", "files": {"scan": "a.nii"}, "gain": 1})
    assert "noise_sd" not in run.to_json()
    done = dataclasses.replace(run, files={}, noise_sd=0.1, residual_ratios=(1.0,))
    assert {"noise_sd", "residual_ratios"} <= set(done.to_json())
    assert "files" not in done.to_json()


def test_the_summary_gathers_files_networks_and_memory():
    steps = StepRecords.from_json(
        {
            "parcellation": {
                "weights": {"name": "net", "sha256": "ab" * 32},
                "given": {"mask": {"uri": "bids:fs:a"}},
            },
            "restore": {"prior": {"sha256": "cd" * 32}},
            "given": {"refined": {"uri": "bids:tool:b"}},
        }
    )
    assert {role: file.uri for role, file in steps.every_file.items()} == {
        "mask": "bids:fs:a", "refined": "bids:tool:b",
    }  # fmt: skip
    assert steps.networks["parcellation"].label == "net, SHA-256 abababababab…"
    assert steps.networks["prior"].label == "unnamed, SHA-256 cdcdcdcdcdcd…"
    nodes = tuple(
        NodeRecord.from_json({"peak_memory_gb": peak, "seconds": 1.5}) for peak in (1.0, 2.5)
    )
    summary = ScanRecord(
        scan="sub-1_T1w", subject="1", status=ScanStatus.SKIPPED, nodes=nodes,
        outputs=("a",), figures=("b",), left=("c",),
        error=ErrorRecord(type="X", message="y"),
    )  # fmt: skip
    assert summary.finished
    assert summary.files == ("a", "b", "c")
    assert summary.peak_memory_gb == 2.5
    assert records.total_seconds(nodes) == 3.0
    assert summary.to_json()["error"] == {
        "node": None, "type": "X", "message": "y", "crash_file": None,
    }  # fmt: skip


def test_a_message_names_its_scan_once():
    scan = "sub-01_run-1_T1w"
    assert named("no brain", scan) == f"{scan}: no brain"
    assert named(f"{scan}: no brain", scan) == f"{scan}: no brain"
    assert named("sub-01_run-2_T1w: moved", scan) == "sub-01_run-2_T1w: moved"  # a fused run's
    assert named("sub-011_T1w: moved", scan) == f"{scan}: sub-011_T1w: moved"
    assert unnamed(f"{scan}: no brain", scan) == unnamed("no brain", scan) == "no brain"

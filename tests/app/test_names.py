# SPDX-License-Identifier: Apache-2.0
"""Names of scans and of their derivatives."""

from __future__ import annotations

import hashlib
import json
from email import message_from_string

import pytest
from bids import BIDSLayout
from hypothesis import given
from hypothesis import strategies as st

from brainprior_bids.bids import derivatives
from brainprior_bids.bids.derivatives import BIDS_VERSION, descriptions, residual_description
from brainprior_bids.bids.names import (
    BIDSName,
    in_common_space,
    output_names,
    scan_seed,
    split_desc,
)
from brainprior_bids.engine.errors import InputError
from brainprior_bids.records import RestoreRecord
from brainprior_bids.settings import MODALITIES, OTHER_MODALITIES, TASKS

labels = st.text("abcXYZ0129", min_size=1, max_size=4)
optional = st.one_of(st.none(), labels)


def test_a_t1w_gets_the_names_that_the_documentation_lists():
    names = output_names(BIDSName.parse("sub-01/anat/sub-01_T1w.nii.gz"), n_samples=4)
    assert set(names.values()) == {
        "sub-01_desc-restored_T1w.nii.gz",
        "sub-01_mod-T1w_desc-restored_uncertainty.nii.gz",
        "sub-01_mod-T1w_desc-restored_residual.nii.gz",
        "sub-01_space-MNI305_desc-restored_T1w.nii.gz",
        "sub-01_mod-T1w_space-MNI305_desc-restored_uncertainty.nii.gz",
        "sub-01_space-MNI305_desc-brain_mask.nii.gz",
        "sub-01_space-MNI305_desc-structures_dseg.nii.gz",
        "sub-01_space-MNI305_desc-structures_dseg.tsv",
        "sub-01_desc-brain_mask.nii.gz",
        "sub-01_desc-structures_dseg.nii.gz",
        "sub-01_desc-structures_dseg.tsv",
        "sub-01_from-T1w_to-MNI305_mode-image_xfm.txt",
        "sub-01_from-MNI305_to-T1w_mode-image_xfm.txt",
    }


def test_saved_samples_are_numbered_from_one():
    source = BIDSName.parse("sub-01_run-2_T1w.nii.gz")
    names = output_names(source, n_samples=2, save_samples=True)
    assert names["sample01"] == "sub-01_run-2_desc-restoredSample01_T1w.nii.gz"
    assert names["sample02"] == "sub-01_run-2_desc-restoredSample02_T1w.nii.gz"
    assert "sample03" not in names
    assert names["sample02_mni305"] == (
        "sub-01_run-2_space-MNI305_desc-restoredSample02_T1w.nii.gz"
    )
    assert "sample01" not in output_names(source, n_samples=2)
    native = output_names(source, n_samples=2, save_samples=True, spaces=["anat"])
    assert not [role for role in native if role.endswith("_mni305") and "xfm" not in native[role]]


def test_in_a_common_space_masks_of_two_contrasts_differ():
    masks = [
        output_names(BIDSName.parse(f"sub-01_{suffix}.nii"), n_samples=1)["mask_mni305"]
        for suffix in ("T1w", "T2w")
    ]
    assert masks == [
        "sub-01_space-MNI305_desc-brain_mask.nii.gz",
        "sub-01_space-MNI305_desc-brainT2w_mask.nii.gz",
    ]


def test_on_a_templates_grid_names_have_res_1_and_the_transforms_are_h5():
    source = BIDSName.parse("sub-01_run-2_T2w.nii")
    spaces = ("anat", "MNI305", "MNI152NLin2009cAsym")
    names = output_names(source, n_samples=2, save_samples=True, spaces=spaces)
    plain = output_names(source, n_samples=2, save_samples=True, spaces=spaces[:2])
    at = "sub-01_run-2_space-MNI152NLin2009cAsym_res-1"
    assert set(names.values()) - set(plain.values()) == {
        f"{at}_desc-restored_T2w.nii.gz",
        f"{at}_desc-restoredSample01_T2w.nii.gz",
        f"{at}_desc-restoredSample02_T2w.nii.gz",
        f"{at}_desc-brainT2w_mask.nii.gz",
        f"{at}_desc-structuresT2w_dseg.nii.gz",
        f"{at}_desc-structuresT2w_dseg.tsv",
        "sub-01_run-2_mod-T2w_space-MNI152NLin2009cAsym_res-1_desc-restored_uncertainty.nii.gz",
        "sub-01_run-2_from-T2w_to-MNI152NLin2009cAsym_mode-image_xfm.h5",
        "sub-01_run-2_from-MNI152NLin2009cAsym_to-T2w_mode-image_xfm.h5",
    }
    assert in_common_space("restored_mni152nlin2009casym")
    assert in_common_space("mask_mni305")
    assert not in_common_space("restored_native")


def test_the_scan_inpainted_has_no_image_in_mni305():
    names = output_names(BIDSName.parse("sub-01_T1w.nii"), n_samples=2, image="inpainted")
    moved = {r for r in names if r.endswith("_mni305")} - {"to_mni305", "from_mni305"}
    assert moved == {"mask_mni305", "structures_mni305", "structures_table_mni305"}


def test_a_t2w_says_whose_space_its_mask_is_in_and_keeps_its_entities():
    source = BIDSName.parse("sub-01_ses-a_acq-thick_run-02_T2w.nii")
    names = output_names(source, n_samples=1)
    assert names["mask"] == "sub-01_ses-a_acq-thick_run-02_space-T2w_desc-brain_mask.nii.gz"
    assert names["restored"] == "sub-01_ses-a_acq-thick_run-02_desc-restored_T2w.nii.gz"
    assert "uncertainty" not in names
    assert str(source.folder) == "sub-01/ses-a"


@given(
    scans=st.lists(
        st.tuples(labels, optional, optional, optional, st.sampled_from(["T1w", "T2w", "FLAIR"])),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_different_scans_never_share_a_name(scans):
    seen: set[str] = set()
    nodes: set[str] = set()
    for sub, ses, acq, run, suffix in scans:
        pairs = [("sub", sub), ("ses", ses), ("acq", acq), ("run", run)]
        source = BIDSName(tuple((k, v) for k, v in pairs if v), suffix)
        names = {f"{source.folder}/{n}" for n in output_names(source, n_samples=4).values()}
        assert len(names) == 13
        assert not names & seen
        seen |= names
        nodes.add(source.node_name)
    assert len(nodes) == len(scans)


@given(labels, optional, optional, st.sampled_from(["T1w", "mask"]))
def test_parsing_undoes_writing(sub, ses, acq, suffix):
    name = BIDSName(
        tuple((k, v) for k, v in (("sub", sub), ("ses", ses), ("acq", acq)) if v),
        suffix,
        ".nii.gz",
    )
    assert BIDSName.parse(name.stem + ".nii.gz") == name


@pytest.mark.parametrize(
    "name", ["T1w.nii.gz", "ses-1_T1w.nii", "sub-01_acq_T1w.nii", "sub-0.1_T1w"]
)
def test_a_name_that_is_not_bids_is_refused(name):
    with pytest.raises(InputError, match=r"Rename|BIDS name"):
        BIDSName.parse(name)


def test_plus_in_a_label_does_not_merge_two_nodes():
    plus, under = (BIDSName.parse(f"sub-01_acq-{a}_T1w.nii") for a in ("a+b", "ab"))
    assert plus.node_name != under.node_name
    assert plus.node_name.replace("_", "").isalnum()


def test_the_scan_seed_is_the_documented_hash():
    source = BIDSName.parse("sub-01_T2w.nii.gz")
    digest = hashlib.sha256(b"7:sub-01_T2w").digest()
    assert scan_seed(7, source) == int.from_bytes(digest[:8], "big") // 2 < 2**63
    assert scan_seed(8, source) != scan_seed(7, source)
    assert scan_seed(7, BIDSName.parse("sub-02_T2w.nii.gz")) != scan_seed(7, source)


def test_no_task_replaces_what_another_made():
    """Except for the scan's mask, structures and transforms, which are the same for every task."""
    name = BIDSName.parse("sub-01_T2w.nii.gz")
    shared = {"mask", "structures", "structures_table", "to_mni305", "from_mni305"}
    shared |= {f"{role}_mni305" for role in shared}
    seen: set[str] = set()
    for task, image in TASKS.items():
        names = output_names(name, n_samples=2, save_samples=True, image=image)
        own = {n for role, n in names.items() if task == "refine" or role not in shared}
        assert not own & seen, task
        seen |= set(names.values())
        for file in own - {names["to_mni305"], names["from_mni305"]}:
            desc = BIDSName.parse(file).get("desc")
            assert split_desc(desc)[0] == image or desc == image, file


def test_every_desc_that_a_task_writes_is_described():
    sources = [BIDSName.parse(f"sub-01_{s}.nii.gz") for s in (*MODALITIES, *OTHER_MODALITIES)]
    written = {
        BIDSName.parse(file).get("desc")
        for source in sources
        for image in TASKS.values()
        for file in output_names(source, n_samples=2, image=image, runs=[source]).values()
    }
    assert written - {None} <= set(descriptions())
    samples = {f"{image}Sample01" for image in TASKS.values()}
    assert set(descriptions()) == (written - {None}) | samples


def test_plain_pybids_finds_one_t1w_per_desc(tmp_path):
    """Without a configuration; maps and masks do not match as images of the contrast."""
    for suffix in ("T1w", "T2w"):
        source = BIDSName.parse(f"sub-01_{suffix}.nii.gz")
        names = output_names(source, n_samples=2, save_samples=True, native=True)
        for name in names.values():
            path = tmp_path / "sub-01" / "anat" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    description = {"Name": "t", "BIDSVersion": BIDS_VERSION, "DatasetType": "derivative"}
    description["GeneratedBy"] = [{"Name": "brainprior"}]
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    layout = BIDSLayout(tmp_path, validate=False, is_derivative=True)
    entities = [image.get_entities() for image in layout.get(suffix="T1w", extension=".nii.gz")]
    result = [(e["desc"], e.get("space"), e.get("res")) for e in entities]
    descs = ("restored", "restoredSample01", "restoredSample02")
    expected = [(desc, space, None) for desc in descs for space in (None, "MNI305")]
    key = lambda item: tuple(map(str, item))  # noqa: E731
    assert sorted(result, key=key) == sorted([*expected, ("restored", None, "native")], key=key)
    image = {"subject": "01", "suffix": "T1w", "extension": ".nii.gz", "desc": "restored"}
    (own,) = layout.get(**image, space=None, res=None)
    assert own.filename == "sub-01_desc-restored_T1w.nii.gz"
    (spread,) = layout.get(
        suffix="uncertainty", modality="T1w", desc="restored", space=None, extension=".nii.gz"
    )
    assert spread.filename == "sub-01_mod-T1w_desc-restored_uncertainty.nii.gz"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Project-URL: Source, https://example.org/code"], "https://example.org/code"),
        (["Home-page: https://example.org"], "https://example.org"),
        ([], None),
    ],
)
def test_the_address_of_the_code_is_in_the_data_sets_description(monkeypatch, lines, expected):
    """From the installed package's metadata; absent while none is stated."""
    stated = message_from_string("\n".join(["Name: brainprior", *lines]))
    monkeypatch.setattr(derivatives, "metadata", lambda name: stated)
    assert derivatives.generated_by().get("CodeURL") == expected


@pytest.mark.parametrize(
    ("sampler", "refined", "text"),
    [
        ("conditional", False, "scan minus the samples' prediction of it (mean over samples), in"),
        ("mean", False, "scan minus its prediction from the restored image, in units of the st"),
        ("mean", True, "the image to refine minus its prediction from the restored image, in un"),
    ],
)
def test_a_residual_is_that_of_samples_where_there_are_samples(sampler, refined, text):
    description = residual_description(
        RestoreRecord.from_json({"sampler": sampler}), refined=refined
    )
    assert description.startswith(text)
    assert description.endswith("--trust") == refined
    assert ("sampl" in description) == (sampler != "mean")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),  # in whatever container these tests run: its name is not known
        ({"BRAINPRIOR_IMAGE": "brainprior:1.0"}, {"Type": "docker", "Tag": "brainprior:1.0"}),
        ({"BRAINPRIOR_IMAGE_DIGEST": "sha256:0"}, {"Type": "docker", "Digest": "sha256:0"}),
        ({"APPTAINER_CONTAINER": "/a.sif"}, {"Type": "apptainer", "Tag": "/a.sif"}),
        (
            {"APPTAINER_CONTAINER": "/a.sif", "BRAINPRIOR_IMAGE": "brainprior:1.0"},
            {"Type": "apptainer", "Tag": "brainprior:1.0"},
        ),
    ],
)
def test_a_container_is_described_if_its_name_is_known(monkeypatch, environment, expected):
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "BRAINPRIOR_IMAGE",
                 "BRAINPRIOR_IMAGE_DIGEST"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # a sandbox or another program's container has this file too
    monkeypatch.setattr(derivatives.Path, "exists", lambda path: str(path) == "/.dockerenv")
    assert derivatives.container() == expected
    assert derivatives.generated_by().get("Container") == expected

"""SparsityProfile: round trip, interpolation, and one line for every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutedsl_kernels import ProfileError, SparsityProfile
from cutedsl_kernels.sparsity import LayerTable, ModelIdentity

pytestmark = pytest.mark.cpu

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
TARGETS = (0.3, 0.5, 0.9)


def contents() -> dict[str, Any]:
    table = {"targets": list(TARGETS), "thresholds": [0.01, 0.02, 0.4], "pair_thresholds": [0.0, 0.0, 0.05]}
    return {
        "format": "intra-expert-sparsity/1",
        "model": {
            "name": "tiny",
            "architecture": "OlmoeForCausalLM",
            "num_layers": 2,
            "num_experts": 16,
            "top_k": 4,
            "hidden_size": 128,
            "intermediate_size": 64,
        },
        "score": "gate-routed",
        "router_weighted": True,
        "calibration": {"tokens": 4096, "text_sha256": "0" * 64, "max_len": 512},
        "layers": {layer: json.loads(json.dumps(table)) for layer in LAYERS},
        "created": {"version": "0.1.0", "date": "2026-11-23"},
    }


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_round_trip(tmp_path: Path) -> None:
    profile = SparsityProfile.from_dict(contents())
    path = tmp_path / "saved.json"
    profile.save(path)
    profile.save(path)  # over an existing file
    assert SparsityProfile.load(path) == profile
    assert json.loads(path.read_text()) == contents()
    assert list(tmp_path.iterdir()) == [path]


def test_rows_and_the_lines_between_them() -> None:
    profile = SparsityProfile.from_dict(contents())
    assert profile.max_target == 0.9
    assert profile.thresholds(LAYERS[0], 0.0) == (0.0, 0.0)
    assert profile.thresholds(LAYERS[0], 0.5) == (0.02, 0.0)
    assert profile.thresholds(LAYERS[0], 0.9) == (0.4, 0.05)
    assert profile.thresholds(LAYERS[0], 0.7) == pytest.approx((0.21, 0.025))
    assert profile.thresholds(LAYERS[0], 0.15) == pytest.approx((0.005, 0.0))


def test_shares_of_skipped_pairs(tmp_path: Path) -> None:
    data = contents() | {"format": "intra-expert-sparsity/2"}
    data["layers"][LAYERS[0]]["pair_skips"] = [0.0, 0.0, 0.35]
    profile = SparsityProfile.from_dict(data)
    assert profile.pair_skip(LAYERS[0], 0.7) == pytest.approx(0.175)
    assert profile.pair_skip(LAYERS[0], 0.0) == 0.0
    assert profile.pair_skip(LAYERS[1], 0.7) is None
    profile.save(tmp_path / "saved.json")
    assert SparsityProfile.load(tmp_path / "saved.json") == profile


@given(
    rows=st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=8),
    targets=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_interpolation_never_decreases(rows: list[tuple[float, float, float]], targets: list[float]) -> None:
    columns = [sorted(column) for column in zip(*rows, strict=True)]
    distinct = sorted(set(columns[0]))
    table = LayerTable(
        targets=tuple(distinct),
        thresholds=tuple(columns[1][: len(distinct)]),
        pair_thresholds=tuple(columns[2][: len(distinct)]),
    )
    low, high = (table.at(t * distinct[-1]) for t in sorted(targets))
    assert low.threshold <= high.threshold + 1e-12
    assert low.pair_threshold <= high.pair_threshold + 1e-12


@pytest.mark.parametrize("target", [-0.1, 0.91, float("nan"), float("inf")])
def test_target_out_of_range(target: float) -> None:
    with pytest.raises(ProfileError, match=r"target_sparsity must lie in 0\.\.0\.9"):
        SparsityProfile.from_dict(contents()).thresholds(LAYERS[0], target)


def test_unknown_layer() -> None:
    with pytest.raises(ProfileError, match=r"no layer 'model\.layers\.7\.mlp\.experts'.*calibrate this model again"):
        SparsityProfile.from_dict(contents()).thresholds("model.layers.7.mlp.experts", 0.5)


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


TABLE = ("layers", LAYERS[1])

DAMAGE = {
    "unknown version": (put("format", value="intra-expert-sparsity/3"), "format is 'intra-expert-sparsity/3'.*reads"),
    "no version": (drop("format"), "format is None"),
    "nan threshold": (put(*TABLE, "thresholds", value=[0.01, float("nan"), 0.4]), r"thresholds\.1: .*finite"),
    "infinite threshold": (put(*TABLE, "thresholds", value=[0.01, 0.2, float("inf")]), r"thresholds\.2: .*finite"),
    "negative threshold": (put(*TABLE, "thresholds", value=[-0.01, 0.2, 0.4]), "thresholds: has a negative value"),
    "negative pair threshold": (put(*TABLE, "pair_thresholds", value=[-1, 0, 0]), "pair_thresholds: has a negative"),
    "falling thresholds": (put(*TABLE, "thresholds", value=[0.2, 0.1, 0.4]), "thresholds: must not decrease"),
    "target twice": (put(*TABLE, "targets", value=[0.3, 0.3, 0.9]), "targets has a value twice"),
    "target above one": (put(*TABLE, "targets", value=[0.3, 0.5, 1.1]), r"targets must lie in 0\.\.1"),
    "columns differ": (put(*TABLE, "thresholds", value=[0.1]), "differ in length"),
    "empty table": (put(*TABLE, value={"targets": [], "thresholds": [], "pair_thresholds": []}), "targets: "),
    "text for a number": (put(*TABLE, "targets", value=["low", 0.5, 0.9]), r"targets\.0: .*number"),
    "skipped pairs in format 1": (put(*TABLE, "pair_skips", value=[0, 0, 0.3]), "pair_skips needs format"),
    "skipped pairs above one": (put(*TABLE, "pair_skips", value=[0, 0, 1.3]), "pair_skips must be shares in 0"),
    "skipped pairs too few": (put(*TABLE, "pair_skips", value=[0.1]), "pair_skips must be shares"),
    "falling skipped pairs": (put(*TABLE, "pair_skips", value=[0.2, 0.1, 0.1]), "pair_skips: must not decrease"),
    "layer missing": (drop(*TABLE), "layers has 1 entries, model.num_layers says 2"),
    "no layers": (put("layers", value={}), "layers: "),
    "unknown field": (put("model", "experts", value=3), r"model\.experts: "),
    "field missing": (drop("calibration", "text_sha256"), r"calibration\.text_sha256: Field required"),
    "hash damaged": (put("calibration", "text_sha256", value="xyz"), r"calibration\.text_sha256: "),
    "no experts": (put("model", "num_experts", value=0), r"model\.num_experts: .*greater than 0"),
    "unknown score": (put("score", value="gate-router"), "score must be one of gate, gate-routed"),
    "target out of range": (put("quality", value={"target_sparsity": 5.0}), "quality.target_sparsity must lie in 0"),
    "rule and score disagree": (put("router_weighted", value=False), "router_weighted must be true for the score"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGE[kind]
    data = contents()
    change(data)
    path = written(tmp_path, data)
    with pytest.raises(ProfileError, match=message) as caught:
        SparsityProfile.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "calibrate again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not valid JSON.*truncated"),
        (json.dumps(contents(), indent=1)[:400], r"line \d+: not valid JSON.*truncated"),
        ("[1, 2]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
    ],
)
def test_not_a_profile(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=message):
        SparsityProfile.load(written(tmp_path, text))


def test_truncation_anywhere_is_an_error(tmp_path: Path) -> None:
    text = json.dumps(contents())
    for end in range(0, len(text), 37):
        with pytest.raises(ProfileError, match="truncated"):
            SparsityProfile.load(written(tmp_path, text[:end]))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"missing\.json: cannot read .*No such file.*calibrate"):
        SparsityProfile.load(tmp_path / "missing.json")
    with pytest.raises(ProfileError, match=r"cannot read .*Is a directory"):
        SparsityProfile.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not UTF-8 text"):
        SparsityProfile.load(tmp_path / "binary")


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    profile = SparsityProfile.from_dict(contents())
    with pytest.raises(ProfileError, match=r"no/such\.json: cannot write .*No such file"):
        profile.save(tmp_path / "no" / "such.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ProfileError, match=r"folder: cannot write .*Is a directory"):
        profile.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "MixtralForCausalLM"),
        ("num_layers", 3),
        ("num_experts", 8),
        ("top_k", 2),
        ("hidden_size", 64),
        ("intermediate_size", 128),
    ],
)
def test_profile_of_another_model(field: str, value: object, tmp_path: Path) -> None:
    path = written(tmp_path, contents())
    other = ModelIdentity(**{**contents()["model"], "name": "other", field: value})
    with pytest.raises(ProfileError, match=rf"model\.{field} is .* but the model being served has .*calibrate"):
        SparsityProfile.load(path, model=other)


def test_name_may_differ(tmp_path: Path) -> None:
    moved = ModelIdentity(**{**contents()["model"], "name": "/elsewhere/tiny"})
    assert SparsityProfile.load(written(tmp_path, contents()), model=moved).model.name == "tiny"

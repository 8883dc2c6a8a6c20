"""Every method by its name in federation.toml: those of the papers, and what is said to a name that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, get_args

import pytest

from edge_client.layers import FAMILIES, resolve_plan
from edge_client.tasks.registry import known_tasks, load_task
from shared.config import (
    AdapterKind,
    Clipping,
    CodecName,
    FederationConfig,
    ImportanceName,
    MergeRule,
    Missing,
    Mode,
    Precision,
    Quality,
    Section,
    ServerOptimizerName,
    SiteConfig,
    StalenessKind,
    StateCodecName,
    StateDType,
    TaskSection,
)
from shared.configfile import load_config
from shared.errors import ConfigError

S = TypeVar("S", bound=Section)

NAMED: dict[str, Any] = {
    "adapter.kind": AdapterKind,
    "aggregation.missing": Missing,
    "aggregation.mode": Mode,
    "aggregation.quality": Quality,
    "aggregation.rule": MergeRule,
    "aggregation.server.optimizer": ServerOptimizerName,
    "aggregation.staleness.kind": StalenessKind,
    "codec.down": StateCodecName,
    "codec.up": CodecName,
    "layers.by": ImportanceName,
}
"""Keys that take a name, and the names."""

NAMED_BY_SITES: dict[str, Any] = {
    "prefix.dtype": StateDType,
    "privacy.clipping": Clipping,
    "training.precision": Precision,
}
"""Those of site.toml."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "FedAvg": {"aggregation.mode": "sync", "aggregation.rule": "mean", "aggregation.server.optimizer": "sgd"},
    "FedProx": {"training.proximal": 0.01},
    "FedAvgM": {"aggregation.server.optimizer": "momentum"},
    "Nesterov": {"aggregation.server.optimizer": "nesterov"},
    "FedAdam": {"aggregation.server.optimizer": "adam"},
    "FedYogi": {"aggregation.server.optimizer": "yogi"},
    "FADAS": {"aggregation.mode": "fedbuff", "aggregation.server.optimizer": "fadas"},
    "delayed Nesterov": {"aggregation.mode": "fedbuff", "aggregation.server.optimizer": "delayed-nesterov"},
    "CA2FL": {"aggregation.mode": "fedbuff", "aggregation.rule": "ca2fl"},
    "FedAsync": {"aggregation.mode": "fedasync", "aggregation.alpha": 0.6},
    "FedBuff": {"aggregation.mode": "fedbuff", "aggregation.buffer": 3},
    "Fed-MedLoRA": {"adapter.kind": "lora", "layers.plan": "all"},
    "Fed-MedLoRA+, as in its code": {"adapter.kind": "lora", "aggregation.quality": "exp-loss"},
    "Fed-MedLoRA+, as in its text": {"adapter.kind": "lora", "aggregation.quality": "size-exp-loss"},
    "FFA-LoRA": {"adapter.kind": "ffa-lora"},
    "FedSA-LoRA": {"adapter.kind": "fedsa-lora"},
    "FedEx-LoRA": {"adapter.kind": "fedex-lora"},
    "LoRA restricted to layers": {"adapter.kind": "lora", "layers.plan": "top:2"},
    "norm clipping": {"aggregation.clip_norm": 1.0},
    "coordinate median": {"aggregation.rule": "median"},
    "trimmed mean": {"aggregation.rule": "trimmed-mean", "aggregation.trim": 0.2},
    "Krum": {"aggregation.rule": "krum", "aggregation.byzantine": 1},
    "multi-Krum": {"aggregation.rule": "multi-krum"},
    "DP-SGD with a noise": {"privacy.delta": 1e-5, "privacy.noise_multiplier": 1.0},
    "DP-SGD with a target": {"privacy.delta": 1e-5, "privacy.target_epsilon": 8.0},
    "FedLPP": {"codec.down": "int8"},
    "sparse ternary compression": {"codec.up": "ternary", "codec.feedback": 1.0},
    "error feedback": {"codec.up": "topk2", "codec.feedback": 0.9},
    "FedPer": {"layers.personal": ["score.*"]},
    "importance": {"layers.plan": "importance:2", "layers.by": "snr", "layers.rechoose": 2},
}
"""Methods as their authors name them, and what stands for them in the file."""

PLANS = {
    "top:2": (2, 3),
    "2": (2, 3),
    "0.5": (2, 3),
    "bottom:2": (0, 1),
    "middle:2": (1, 2),
    "random:2": (1, 3),
    "0,2": (0, 2),
    "importance:2": (0, 1, 2, 3),
    "all": (0, 1, 2, 3),
}
"""Of four blocks."""


def loaded(folder: Path, values: dict[str, Any]) -> FederationConfig:
    """What a federation file says that has these values and only what it must beside them."""
    return written(folder / "federation.toml", FederationConfig, {"federation.name": "a", "model.base": "m"} | values)


def loaded_site(folder: Path, values: dict[str, Any]) -> SiteConfig:
    """The same of a site's file."""
    needed = {"name": "a", "federation": "federation.toml", "storage": "a", "data.notes": "notes"}
    return written(folder / "site.toml", SiteConfig, needed | values)


def written(path: Path, kind: type[S], values: dict[str, Any]) -> S:
    """What a file says that has these values at their dotted paths."""
    sections: dict[str, list[str]] = {"": []}
    for place, value in values.items():
        section, _, key = place.rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {json.dumps(value)}")
    texts = (f"[{section}]\n" * bool(section) + "\n".join(lines) for section, lines in sections.items())
    path.write_text("\n".join(texts))
    return load_config(path, kind)


def found(config: FederationConfig | SiteConfig, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in NAMED for name in get_args(NAMED[path])])
def test_a_name_is_taken(path: str, name: str, tmp_path: Path) -> None:
    """Each on its own, beside defaults."""
    assert found(loaded(tmp_path, {path: name}), path) == name


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in NAMED_BY_SITES for name in get_args(NAMED_BY_SITES[path])]
)
def test_a_name_in_a_site_s_file_is_taken(path: str, name: str, tmp_path: Path) -> None:
    """Each on its own, beside defaults."""
    assert found(loaded_site(tmp_path, {path: name}), path) == name


@pytest.mark.parametrize("path", [*NAMED, *NAMED_BY_SITES])
def test_a_name_that_is_none_lists_those_that_are(path: str, tmp_path: Path) -> None:
    """All of them, with the key and the file."""
    load, file = (loaded, "federation.toml") if path in NAMED else (loaded_site, "site.toml")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {path: "nonesuch"})
    assert f"{tmp_path / file}: {path}: Input should be " in caught.value.message
    assert all(f"'{name}'" in caught.value.message for name in get_args((NAMED | NAMED_BY_SITES)[path]))


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_published_method_is_a_few_lines(method: str, tmp_path: Path) -> None:
    """What stands in the file is what is meant; it changes what all must agree on, unless it is what nobody writes."""
    values = PUBLISHED[method]
    config = loaded(tmp_path, values)
    assert {path: found(config, path) for path in values} == values
    assert (config.config_sha256 == loaded(tmp_path, {}).config_sha256) == (method == "FedAvg")


def test_every_name_belongs_to_a_published_method_or_is_plain() -> None:
    """Whoever adds a name says whose method it is."""
    said = {(path, value) for values in PUBLISHED.values() for path, value in values.items() if path in NAMED}
    plain = {path: set(get_args(names)) for path, names in NAMED.items()}
    left = {path: names - {value for key, value in said if key == path} for path, names in plain.items()}
    assert left == {
        "adapter.kind": {"none"},
        "aggregation.missing": {"omit", "zero"},
        "aggregation.mode": set(),
        "aggregation.quality": {"none"},
        "aggregation.rule": set(),
        "aggregation.server.optimizer": set(),
        "aggregation.staleness.kind": {"constant", "hinge", "polynomial"},  # FedAsync has all three
        "codec.down": {"f32", "bf16", "int4"},
        "codec.up": {"f32", "bf16", "int8", "int4", "topk2x4"},
        "layers.by": {"gradient-norm", "relative-gradient-norm"},
    }


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_taken(plan: str, tmp_path: Path) -> None:
    """And means these of four blocks."""
    config = loaded(tmp_path, {"layers.plan": plan})
    assert resolve_plan(config.layers.plan, 4, seed=5) == PLANS[plan]


def test_a_plan_that_is_none_lists_those_that_are() -> None:
    """By the hint, each by its name."""
    with pytest.raises(ConfigError) as caught:
        resolve_plan("uppermost:2", 4)
    names = {plan.partition(":")[0] for plan in PLANS if plan[0].isalpha()}
    assert all(name in caught.value.hint for name in names)


@pytest.mark.parametrize("kind", ["ner", "classification", "multilabel", "extraction", "relations"])
def test_a_task_is_taken(kind: str, tmp_path: Path) -> None:
    """By its entry point, with the labels of the file."""
    task = load_task(loaded(tmp_path, {"task.kind": kind, "task.labels": ["fever", "cough"]}).task)
    assert task.head.writes == (kind in {"extraction", "relations"})
    assert kind in known_tasks()


def test_a_task_that_is_none_lists_those_that_are() -> None:
    """Where models are loaded; a coordinator's host has no task."""
    with pytest.raises(ConfigError) as caught:
        load_task(TaskSection(kind="nonesuch"))
    assert all(kind in caught.value.message for kind in known_tasks())


def test_the_types_of_model_are_known_by_name() -> None:
    """Those of both papers, and the usual others."""
    assert set(FAMILIES) == {"bert", "gpt2", "llama", "mistral", "qwen2", "qwen3"}

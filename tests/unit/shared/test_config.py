"""Configuration files: what is read, where paths lead, what the fingerprint covers, and words for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from shared.config import CodecName, CoordinatorConfig, FederationConfig, Section, SiteConfig
from shared.configfile import load_config, parse_config
from shared.errors import ConfigError

FEDERATION: dict[str, Any] = {"federation": {"name": "ward"}, "model": {"base": "org/model"}}
COORDINATOR = 'federation = "federation.toml"\nstorage = "data"\n'
AGGREGATION = '[federation]\nname="a"\n[model]\nbase="m"\n[aggregation]\n'
FOUR_SITES = AGGREGATION.replace('name="a"\n', 'name="a"\nsites=["a", "b", "c", "d"]\n')
SITE = 'name = "north"\nfederation = "f.toml"\nstorage = "s"\n[data]\nnotes = "notes"\n'


def _write(folder: Path, text: str | bytes) -> Path:
    path = folder / "x.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def _federation(**sections: dict[str, Any]) -> FederationConfig:
    merged = {key: {**FEDERATION.get(key, {}), **sections.get(key, {})} for key in {*FEDERATION, *sections}}
    return parse_config(merged, FederationConfig, "test")


def _refused(path: Path, model: type[Section]) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load_config(path, model)
    assert refused.value.hint
    return refused.value


# -- reading ---


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    """Two keys make a federation, and the rest has values that work."""
    config = load_config(_write(tmp_path, '[federation]\nname = "ward"\n[model]\nbase = "m"\n'), FederationConfig)
    assert config.federation.name == "ward"
    assert config.federation.versions == 10
    assert config.aggregation.mode == "sync"
    assert config.task.labels == ("problem", "treatment", "test")


def test_relative_paths_start_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from wherever the command was typed; nested ones too, and a home folder is where it is."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/somebody")
    text = (
        'name = "north"\nfederation = "../f.toml"\nstorage = "/var/lib/mailboat"\nmodel_dir = "~/model"\n'
        '[data]\nnotes = "notes"\n[broker]\npassword_file = "secrets/password"\n'
    )
    (tmp_path / "conf").mkdir()
    config = load_config(_write(tmp_path / "conf", text), SiteConfig)
    assert config.federation == tmp_path / "conf" / "../f.toml"
    assert config.storage == Path("/var/lib/mailboat")
    assert config.model_dir == Path("/home/somebody/model")
    assert config.data.notes == tmp_path / "conf" / "notes"
    assert config.broker.password_file == tmp_path / "conf" / "secrets" / "password"
    assert config.broker.ca_file is None


@pytest.mark.parametrize("here", [True, False])
def test_a_model_is_a_folder_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    """Beside the file, not beside whoever typed the command; else what is named is an id on the hub."""
    monkeypatch.chdir("/")
    model = tmp_path / "ward" / "model"
    if here:
        model.mkdir(parents=True)
    text = '[federation]\nname = "x"\nversions = 1\n[model]\nbase = "ward/model"\n'
    config = load_config(_write(tmp_path, text), FederationConfig)
    assert config.model.base == (str(model) if here else "ward/model")


def test_a_relative_name_of_the_file_itself_is_no_trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--config x.toml` gives the same paths as its full name, also after a change of folder."""
    _write(tmp_path, COORDINATOR)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("x.toml"), CoordinatorConfig)
    assert config.storage == tmp_path.resolve() / "data"
    assert config.storage.is_absolute()


def test_a_configuration_does_not_change() -> None:
    """Frozen: whoever holds it may rely on it."""
    with pytest.raises(ValueError, match="frozen"):
        _federation().federation = None  # type: ignore[misc, assignment]


# -- mistakes ---


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Each says what is wrong with the file and names it."""
    missing = tmp_path / "none.toml"
    assert _refused(missing, CoordinatorConfig).message == f"{missing}: no such file"
    below = _write(tmp_path, COORDINATOR) / "x.toml"
    assert _refused(below, CoordinatorConfig).message == f"{below}: no such file"
    assert _refused(tmp_path, CoordinatorConfig).message == f"{tmp_path} is a folder, a TOML file was expected"
    path = _write(tmp_path, b'federation = "\xff"')
    assert _refused(path, CoordinatorConfig).message == f"{path}: not UTF-8 at byte 14"
    path = _write(tmp_path, "federation = \nstorage")
    assert re.fullmatch(rf"{re.escape(str(path))}: not TOML: .*line 1.*", _refused(path, CoordinatorConfig).message)
    path = _write(tmp_path, 'storage = "a"\nstorage = "b"')
    assert "not TOML" in _refused(path, CoordinatorConfig).message


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner and mode are what to look at (tests run as a user whom no mode keeps out: the refusal is put in)."""

    def denied(*_args: object, **_more: object) -> str:
        raise PermissionError

    path = _write(tmp_path, COORDINATOR)
    monkeypatch.setattr(Path, "read_text", denied)
    assert _refused(path, CoordinatorConfig).message == f"{path} may not be read by this user"


@pytest.mark.parametrize(
    ("model", "text", "problem"),
    [
        (CoordinatorConfig, COORDINATOR + "storge = 1", "unknown key storge: did you mean storage?"),
        (CoordinatorConfig, COORDINATOR + "[link]\nstal_s = 1", "unknown key link.stal_s: did you mean stall_s?"),
        (
            CoordinatorConfig,
            COORDINATOR + "[link]\nqqq = 1",
            "unknown key link.qqq: known here: backoff_cap_s, keepalive_s, stall_s, window",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[aggregation.server]\nmomentun=0.5',
            "unknown key aggregation.server.momentun: did you mean momentum?",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[aggregation]\nmode="fedasync"\nserver={optimizer="adam"}',
            'aggregation: [aggregation.server] has no meaning with mode = "fedasync"',
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[aggregation]\nmode="fedasync"\nclip_norm=1.0',
            'aggregation: clip_norm has no meaning with mode = "fedasync"',
        ),
        (
            FederationConfig,
            AGGREGATION + 'rule="kurm"',
            "aggregation.rule: Input should be 'mean', 'ca2fl', 'median', 'trimmed-mean', 'krum' or 'multi-krum'",
        ),
        (
            FederationConfig,
            AGGREGATION + 'quality="loss"',
            "aggregation.quality: Input should be 'none', 'exp-loss' or 'size-exp-loss'",
        ),
        (
            FederationConfig,
            AGGREGATION + 'mode="fedbuff"\nrule="krum"\nbuffer=4',
            'aggregation: rule = "krum" needs 5 updates in a round or more (2 byzantine + 3), and buffer = 4',
        ),
        (
            FederationConfig,
            AGGREGATION + 'mode="fedbuff"\nrule="trimmed-mean"\ntrim=0.3\nbuffer=3',
            'aggregation: rule = "trimmed-mean" needs 4 updates in a round or more (1 / trim), and buffer = 3',
        ),
        (
            FederationConfig,
            FOUR_SITES + 'rule="multi-krum"',
            'rule = "multi-krum" needs 5 updates in a round or more (2 byzantine + 3), and [federation] sites has 4',
        ),
        (
            FederationConfig,
            FOUR_SITES + 'rule="trimmed-mean"',
            'rule = "trimmed-mean" needs 5 updates in a round or more (1 / trim), and [federation] sites has 4',
        ),
        (
            FederationConfig,
            AGGREGATION + 'rule="median"\nmissing="zero"',
            'aggregation: missing = "zero" is for a weighted mean',
        ),
        (
            FederationConfig,
            AGGREGATION + 'mode="fedasync"\nmissing="zero"',
            'aggregation: missing = "zero" is for a weighted mean',
        ),
        (
            FederationConfig,
            AGGREGATION + 'rule="ca2fl"\nclip_norm=1.0',
            'aggregation: clip_norm has no meaning with rule = "ca2fl"',
        ),
        (
            FederationConfig,
            AGGREGATION + 'quality="exp-loss"\nrule="median"',
            'aggregation: quality = "exp-loss" weighs a mean: it needs rule = "mean"',
        ),
        (
            FederationConfig,
            AGGREGATION + 'quality="exp-loss"\nmode="fedasync"',
            'aggregation: quality = "exp-loss" weighs a mean',
        ),
        (
            FederationConfig,
            AGGREGATION + 'rule="ca2fl"\nmode="fedasync"',
            'aggregation: rule = "ca2fl" needs several updates',
        ),
        (FederationConfig, AGGREGATION + "temperature=0", "aggregation.temperature: Input should be greater than 0"),
        (
            CoordinatorConfig,
            COORDINATOR + "[validation]\nnote = 'n'",
            "unknown key validation.note: did you mean notes?",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[aggregation.server]\noptimizer="adm"',
            "aggregation.server.optimizer: Input should be 'sgd', 'momentum', 'nesterov', 'adam', 'yogi', 'fadas' or",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[privacy]\ndelta=1e-5',
            "privacy: needs either noise_multiplier or target_epsilon",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[privacy]\nnoise_multiplier=1\ntarget_epsilon=8\ndelta=1e-5',
            "privacy: needs either noise_multiplier or target_epsilon",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[privacy]\nnoise_multiplier=1\ndelta=0.5',
            "privacy.delta: Input should be less than or equal to 0.01",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[privacy]\nnoise=1\ndelta=1e-5',
            "unknown key privacy.noise: did you mean noise_multiplier?",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[adapter]\nkind="fedex"',
            "adapter.kind: Input should be 'none', 'lora', 'ffa-lora', 'fedsa-lora' or 'fedex-lora'",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[adapter]\nkind="fedex-lora"\n[aggregation]\nmode="fedasync"',
            '[adapter] kind = "fedex-lora" corrects a weighted mean that is added as it is: it needs [aggregation]',
        ),
        (
            FederationConfig,
            AGGREGATION + 'quality="exp-loss"\n[layers]\npersonal=["score.*"]',
            '[aggregation] quality = "exp-loss" measures each site\'s model at the coordinator, which has not what',
        ),
        (
            FederationConfig,
            AGGREGATION + 'quality="size-exp-loss"\n[adapter]\nkind="fedsa-lora"',
            '[aggregation] quality = "size-exp-loss" measures each site\'s model at the coordinator',
        ),
        (CoordinatorConfig, 'storage = "s"', "federation is missing"),
        (SiteConfig, SITE.replace('notes = "notes"', ""), "data.notes is missing"),
        (CoordinatorConfig, COORDINATOR + 'credit_mib = "many"', "credit_mib: Input should be a valid integer"),
        (CoordinatorConfig, COORDINATOR + "credit_mib = 0", "credit_mib: Input should be greater than or equal to 1"),
        (CoordinatorConfig, COORDINATOR + "[link]\nstall_s = 0", "link.stall_s: Input should be greater than 0"),
        (CoordinatorConfig, COORDINATOR + "[link]\nstall_s = inf", "link.stall_s: Input should be a finite number"),
        (CoordinatorConfig, COORDINATOR + "[link]\nstall_s = nan", "link.stall_s: Input should be"),
        (CoordinatorConfig, COORDINATOR + "link = 5", "link: Input should be a valid dictionary"),
        (SiteConfig, SITE.replace("north", "St. Mary"), "name: String should match pattern"),
        (SiteConfig, SITE.replace("north", "coordinator"), "name: no site may be named coordinator"),
        (CoordinatorConfig, COORDINATOR + '[broker]\nurl = "tcp://x"', "broker.url: must start with mqtt:// or mqtts"),
        (CoordinatorConfig, COORDINATOR + '[broker]\nkey_file = "k"', "broker: cert_file and key_file go together"),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[task]\nlabels=["x","x"]',
            "task.labels: labels must be distinct and at least one",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[task]\nlabels=[]',
            "task.labels: labels must be distinct and at least one",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[codec]\nup="fp8"',
            "codec.up: Input should be 'f32', 'bf16', 'int8', 'int4', 'ternary', 'topk2x4' or 'topk2'",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[codec]\ndown="topk2"',
            'codec: down = "topk2" is no codec for whole states: set steps, or one of f32, bf16, int8, int4',
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[codec]\nup="f32"\nfeedback=0.9',
            "codec: f32 leaves nothing out that could be added later: set feedback to 0, or another codec",
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\n[model]\nbase="m"\n[codec]\nup="topk2"\n[aggregation]\nrule="median"',
            '[codec] up = "topk2" sends few values of each tensor, and rule = "median" would take the zeros between',
        ),
        (
            FederationConfig,
            '[federation]\nname="a"\nsites=["b","coordinator"]\n[model]\nbase="m"',
            "federation.sites.1: no site may be named coordinator",
        ),
        (
            SiteConfig,
            'name="a"\nfederation="f"\nstorage="s"\n[data]\nnotes="n"\n[training]\ndevice="gpu"',
            "training.device: must be auto, cpu, cuda or cuda:N",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) and "\n" not in value else "",
)
def test_each_wrong_key_is_named_with_what_is_wrong(
    model: type[Section], text: str, problem: str, tmp_path: Path
) -> None:
    """The file, the key with its section, and how to mend it."""
    path = _write(tmp_path, text)
    error = _refused(path, model)
    assert error.message.startswith(f"{path}: {problem}"), error.message
    assert error.hint == "mend the key"


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    """One look at the message mends the file."""
    error = _refused(_write(tmp_path, 'storage = "s"\ncredit_mib = 0\nstorge = 1'), CoordinatorConfig)
    for problem in ("federation is missing", "credit_mib: ", "unknown key storge: did you mean storage?"):
        assert problem in error.message
    assert error.message.count(";") == 2
    assert error.hint == "mend these keys"


@pytest.mark.parametrize(
    "rule",
    ['rule="krum"\nbyzantine=1', 'rule="trimmed-mean"\ntrim=0.2', 'mode="fedbuff"\nrule="trimmed-mean"\nbuffer=5'],
)
def test_as_many_as_a_rule_needs_are_enough(rule: str, tmp_path: Path) -> None:
    """Five sites, or a buffer of five; and where anybody may take part, nobody knows how many there will be."""
    five = FOUR_SITES.replace('"d"', '"d", "e"')
    for text in (five, FOUR_SITES.replace('sites=["a", "b", "c", "d"]', "")):
        assert load_config(_write(tmp_path, text + rule), FederationConfig).aggregation.fewest[0] == 5


def test_a_quorum_that_all_sites_cannot_reach_is_refused(tmp_path: Path) -> None:
    """Of four sites four may be asked for; five would keep the first version open for ever."""
    assert load_config(_write(tmp_path, FOUR_SITES + "quorum=4"), FederationConfig).aggregation.quorum == 4
    error = _refused(_write(tmp_path, FOUR_SITES + "quorum=5"), FederationConfig)
    assert "quorum = 5 is never reached: [federation] sites has 4" in error.message
    load_config(_write(tmp_path, FOUR_SITES + 'quorum=5\nmode="fedbuff"'), FederationConfig)  # which has none


def test_feedback_follows_from_the_codec() -> None:
    """Those of top-k keep 95 % of what they left out, the others nothing, unless the file says otherwise."""
    decays = {up: _federation(codec={"up": up}).codec.decay for up in get_args(CodecName)}
    assert decays == {"f32": 0, "bf16": 0, "int8": 0, "int4": 0, "ternary": 0, "topk2": 0.95, "topk2x4": 0.95}
    assert _federation(codec={"up": "int4", "feedback": 1.0}).codec.decay == 1
    assert _federation(codec={"up": "topk2", "feedback": 0.0}).codec.decay == 0


# -- the fingerprint ---


def test_where_the_model_lies_is_each_machines_business() -> None:
    """A hub id here and a folder there: still the same federation."""
    assert _federation(model={"base": "/srv/model"}).config_sha256 == _federation().config_sha256


def _leaves(section: Section, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in section:
        if isinstance(value, Section):
            found += _leaves(value, (*path, name))
        else:
            found.append(((*path, name), value))
    return found


def _other(path: tuple[str, ...], value: Any) -> Any:
    """A valid value other than the default."""
    if path == ("trust", "mode"):
        return "sealed"
    if path[0] == "adapter" and path[1] in {"kind", "targets"}:
        return {"kind": "lora", "targets": ["q_proj"]}[path[1]]
    key = path[-1]
    named = {
        "kind": "constant",
        "up": "f32",
        "down": "f32",
        "mode": "fedasync",
        "optimizer": "momentum",
        "rule": "median",
        "quality": "exp-loss",
        "missing": "zero",
        "sites": ["a"],
        "labels": ["x"],
        "personal": ["score.*"],
        "by": "snr",
        "frozen_sha256": "0" * 64,
        "slice_kib": 64,
        "privacy": {"delta": 1e-5, "noise_multiplier": 1.0},
    }
    if key in named:
        return named[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float) or value is None:
        return (value or 1.0) / 2
    return f"{value}x"


KEYS = [path for path, _ in _leaves(_federation()) if path not in {("model", "base"), ("task", "kind")}]


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_every_other_key_must_agree(path: tuple[str, ...]) -> None:
    """Any difference in what is learnt, exchanged or merged gives another fingerprint."""
    values = dict(_leaves(_federation()))
    changed: Any = _other(path, values[path])
    for part in reversed(path[1:]):
        changed = {part: changed}
    assert _federation(**{path[0]: changed}).config_sha256 != _federation().config_sha256


def test_all_of_privacy_must_agree() -> None:
    """Each of its keys."""
    noise, target = {"delta": 1e-5, "noise_multiplier": 1.0}, {"delta": 1e-5, "target_epsilon": 1.0}
    sections = [
        noise,
        target,
        {**noise, "delta": 1e-6},
        {**noise, "clip_norm": 2.0},
        {**noise, "noise_multiplier": 2.0},
    ]
    found = {_federation(privacy=section).config_sha256 for section in sections}
    assert len(found | {_federation().config_sha256}) == 1 + len(sections)


def test_the_fingerprint_is_of_the_meaning_not_of_the_text(tmp_path: Path) -> None:
    """Order, comments and defaults that are spelt out do not count."""
    plain = load_config(_write(tmp_path, '[federation]\nname="ward"\n[model]\nbase="m"\n'), FederationConfig)
    text = '# ours\n[model]\nbase = "m"\nrevision = "main"\n[federation]\nversions = 10\nname = "ward"\n'
    assert load_config(_write(tmp_path, text), FederationConfig).config_sha256 == plain.config_sha256
    assert re.fullmatch("[0-9a-f]{64}", plain.config_sha256)

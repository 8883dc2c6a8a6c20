"""Which layers of a model are trained: a plan's text against the real depth, and the tensors that follow.

Only names and numbers, no model: everything here can be tried without torch. Blocks are counted from 0 at the bottom
(next to the embeddings), as in the names of a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from shared.config import IMPORTANCE_PLAN
from shared.errors import ConfigError

CANDIDATES_MAX = 48
"""Each has a metric in an update, which has 64."""

ALL = "all"
"""The plan under which every parameter is trained, embeddings too: full-model federated averaging."""

_FORMS = (
    "top:6 (or 6), bottom:6, middle:6, random:6, each also with a share of the depth such as top:0.375 (or 0.375), "
    "a list such as 10,11,15, importance:6, or all"
)


@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts of one type of model are, as prefixes of tensor names of its classes with a head."""

    backbone: str
    """The pre-trained model as an attribute of the class with the head."""
    blocks: str
    """The list of blocks as a dotted path; block i is `blocks.i`."""
    final_norm: str | None
    """The norm above the top block, trained with it; None where each block ends in its own."""
    head: str
    """The task's classifier; empty in the class that writes text, whose output layer is pre-trained and frozen."""
    causal: bool
    """True when a position sees only what stands to its left."""
    whole_head: str
    """The classifier's name in the class for whole sequences; `head` holds the one for tokens."""
    linears: tuple[str, ...]
    """The linear layers of a block, as paths below it."""
    whole_pooler: str | None = None
    """In the class for whole sequences, what stands between the top block and the classifier; trained with it."""
    pooler: str | None = None
    """The same in the class that this family is used with."""

    def for_whole(self) -> Family:
        """The same family in its class for whole sequences."""
        return replace(self, head=self.whole_head, pooler=self.whole_pooler)

    def block_prefix(self, index: int) -> str:
        """The start of the names of block `index`'s tensors."""
        return f"{self.blocks}.{index}."

    def is_head(self, name: str) -> bool:
        """True for a tensor of the task's classifier, or of the pooler below it."""
        return name.startswith(tuple(f"{part}." for part in self.head_parts))

    def for_text(self) -> Family:
        """The same family in its class that writes text."""
        return replace(self, head="")

    @property
    def head_parts(self) -> tuple[str, ...]:
        """What stands above the blocks for the task alone, from the top down."""
        return tuple(part for part in (self.head, self.pooler) if part)


_DECODER = Family(
    "model",
    "model.layers",
    "model.norm",
    "score",
    causal=True,
    whole_head="score",
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
)

FAMILIES = MappingProxyType(
    {
        "bert": Family(
            "bert",
            "bert.encoder.layer",
            None,
            "classifier",
            causal=False,
            whole_head="classifier",
            linears=(
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            ),
            whole_pooler="bert.pooler",
        ),
        "gpt2": Family(
            "transformer",
            "transformer.h",
            "transformer.ln_f",
            "classifier",
            causal=True,
            whole_head="score",
            linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ),
        "llama": _DECODER,
        "mistral": _DECODER,
        "qwen2": _DECODER,
        "qwen3": _DECODER,
    }
)
"""By the key `model_type` of a model's config.json."""


def family_of(model_type: str, where: str) -> Family:
    """Return the family of `model_type`; ConfigError names `where`, the type and the known ones."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"{where}: layers of model type {model_type!r} are not known",
            hint=f"choose a model of one of these types: {', '.join(sorted(FAMILIES))}",
        )
    return family


def depth_of(names: Iterable[str], family: Family) -> int:
    """Return the number of blocks that occur in `names`."""
    prefix = f"{family.blocks}."
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)})


def resolve_plan(text: str, depth: int, *, seed: int = 0, among: str = "1.0") -> tuple[int, ...]:
    """Return the trained blocks, ascending, that the plan `text` means in a model of `depth` blocks.

    `top:6`, or `6`, are the top six, `bottom:6` the lowest, `middle:6` those around the middle (the lower ones when
    they cannot be centred), `random:6` six that follow from `seed`; `0.375` in the place of a count is that share of
    the depth, rounded, at least one block. `10,11,15` is that list; `all` is every block (and, see `trainable_names`,
    the rest of the model). `importance:6` are the blocks of the plan `among`, of which six at a time are trained, see
    `trained_at_once`. Raises ConfigError that names the key, what was asked and the depth.
    """
    asked = text.strip().lower()
    if asked.startswith(IMPORTANCE_PLAN):
        return _candidates(among, depth, seed)
    if asked == ALL:
        return tuple(range(depth))
    if "," in asked:
        return _listed(asked, depth)
    where, colon, amount = asked.rpartition(":")
    choose = _CHOICES.get(where if colon else "top")
    if choose is None:
        raise _unreadable(asked, depth)
    return tuple(choose(_count(amount, asked, depth), depth, seed))


def trained_at_once(text: str, depth: int, planned: Sequence[int]) -> int | None:
    """Return how many of the `planned` blocks are trained at a time where importance chooses; None in other plans.

    ConfigError when there are not so many, or more than updates can tell scores of.
    """
    asked = text.strip().lower()
    if not asked.startswith(IMPORTANCE_PLAN):
        return None
    count = _count(asked.removeprefix(IMPORTANCE_PLAN), asked, depth)
    if count > len(planned):
        raise ConfigError(
            f"layers.plan = {asked!r} asks for {count} blocks of the {len(planned)} in layers.among",
            hint=f"ask for at most {len(planned)}, or name more in layers.among",
        )
    if len(planned) > CANDIDATES_MAX:
        raise ConfigError(
            f"layers.plan = {asked!r} would choose among {len(planned)} blocks, at most {CANDIDATES_MAX} are possible",
            hint='name fewer, such as layers.among = "top:32"',
        )
    return count


def trainable_names(names: Iterable[str], family: Family, layers: Iterable[int], *, full: bool) -> tuple[str, ...]:
    """Return those of a model's parameter `names` that are trained, sorted.

    These are the blocks `layers`, the task's head, and the final norm when the top block is trained. Embeddings are
    trained only when `full` is true, and then so is everything else.
    """
    known = sorted(names)
    if full:
        return tuple(known)
    chosen = set(layers)
    prefixes = [family.block_prefix(index) for index in sorted(chosen)]
    prefixes += [f"{part}." for part in family.head_parts]
    if family.final_norm is not None and depth_of(known, family) - 1 in chosen:
        prefixes.append(f"{family.final_norm}.")
    return tuple(name for name in known if name.startswith(tuple(prefixes)))


def block_of(name: str, family: Family) -> int | None:
    """Return the block that the tensor `name` is in; None for one that is in none."""
    prefix = f"{family.blocks}."
    return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else None


def names_within(
    names: Iterable[str], family: Family, planned: Iterable[int], here: Iterable[int], *, full: bool
) -> tuple[str, ...]:
    """Return those of the plan's tensors `names` that a site trains which trains `here` alone of the `planned` blocks.

    Head and final norm are always among them; the rest of a model that is trained whole (`full`) only with all blocks.
    """
    left_out = tuple(family.block_prefix(index) for index in sorted(set(planned) - set(here)))
    if not left_out:
        return tuple(names)
    kept = [name for name in names if not name.startswith(left_out)]
    if not full:
        return tuple(kept)
    above = (f"{family.blocks}.", *(f"{part}." for part in (*family.head_parts, family.final_norm) if part))
    return tuple(name for name in kept if name.startswith(above))


def personal_names(trained: Sequence[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Return those of the `trained` tensors that stay at their site: whose name one of the `patterns` matches.

    ConfigError when a pattern matches none of them, and when nothing is left to exchange.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in trained if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(
                f"layers.personal = {pattern!r} matches none of the {len(trained)} tensors that are trained",
                hint=f"their names begin with {trained[0]} and end with {trained[-1]}; * stands for any characters",
            )
        chosen |= matched
    if len(chosen) == len(trained):
        raise ConfigError(
            "layers.personal keeps every trained tensor at its site, and nothing is left to exchange",
            hint="name fewer tensors",
        )
    return tuple(name for name in trained if name in chosen)


def is_full(text: str) -> bool:
    """True when the plan `text` trains the whole model."""
    return text.strip().lower() == ALL


def _candidates(among: str, depth: int, seed: int) -> tuple[int, ...]:
    if among.strip().lower() == ALL or among.strip().lower().startswith(IMPORTANCE_PLAN):
        raise ConfigError(
            f"layers.among = {among!r} names no blocks to choose among", hint='name them, such as "top:12", or "1.0"'
        )
    return resolve_plan(among, depth, seed=seed)


def _random(count: int, depth: int, seed: int) -> list[int]:
    """Drawn without replacement, by rank of a hash: the same on any machine and under any version of Python."""
    ranked = sorted(range(depth), key=lambda index: hashlib.sha256(f"{seed}\nlayers\n{index}".encode()).digest())
    return sorted(ranked[:count])


_CHOICES: Mapping[str, Callable[[int, int, int], Iterable[int]]] = MappingProxyType(
    {
        "top": lambda count, depth, _seed: range(depth - count, depth),
        "bottom": lambda count, _depth, _seed: range(count),
        "middle": lambda count, depth, _seed: range((depth - count) // 2, (depth + count) // 2),
        "random": _random,
    }
)
"""By name: which blocks a plan of so many takes."""


def _count(amount: str, asked: str, depth: int) -> int:
    count = _share(amount, asked, depth) if "." in amount else _whole(amount, asked, depth)
    if count > depth:
        raise ConfigError(
            f"layers.plan = {asked!r} asks for {count} blocks, the model has {depth}",
            hint=f"ask for at most {depth}",
        )
    if count < 1:
        raise ConfigError(f"layers.plan = {asked!r} trains no block of the model's {depth}", hint="ask for at least 1")
    return count


def _listed(asked: str, depth: int) -> tuple[int, ...]:
    chosen = [_whole(part.strip(), asked, depth) for part in asked.rstrip(",").split(",")]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"layers.plan = {asked!r} names a block twice", hint="name each block once")
    if max(chosen) >= depth:
        raise ConfigError(
            f"layers.plan = {asked!r} names block {max(chosen)}, the model has {depth}, counted from 0",
            hint=f"the top block is {depth - 1}",
        )
    return tuple(sorted(chosen))


def _share(amount: str, asked: str, depth: int) -> int:
    try:
        share = float(amount)
    except ValueError:
        raise _unreadable(asked, depth) from None
    if not 0 < share <= 1:
        raise ConfigError(
            f"layers.plan = {asked!r} is no share of the model's {depth} blocks",
            hint="a share lies above 0 and is at most 1.0",
        )
    return max(1, round(share * depth))


def _whole(part: str, asked: str, depth: int) -> int:
    if not (part.isascii() and part.isdigit() and len(part) < 10):
        raise _unreadable(asked, depth)
    return int(part)


def _unreadable(asked: str, depth: int) -> ConfigError:
    return ConfigError(f"layers.plan = {asked!r} is not a layer plan (the model has {depth} blocks)", hint=_FORMS)

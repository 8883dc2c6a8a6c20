"""Which layers of a model are trained: a plan's text against the real depth, and the tensors that follow.

Only names and numbers, no model: everything here can be tried without torch. Blocks are counted from 0 at the bottom
(next to the embeddings), as in the names of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType

from shared.errors import ConfigError

ALL = "all"
"""The plan under which every parameter is trained, embeddings too: full-model federated averaging."""

_FORMS = "a count such as 6 or top:6, a share of the depth such as 0.375, a list such as 10,11,15, or all"


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


def resolve_plan(text: str, depth: int) -> tuple[int, ...]:
    """Return the trained blocks, ascending, that the plan `text` means in a model of `depth` blocks.

    `6` and `top:6` are the top six; `0.375` is that share of the depth from the top, rounded, at least one block;
    `10,11,15` is that list; `all` is every block (and, see `trainable_names`, the rest of the model).
    Raises ConfigError that names the key, what was asked and the depth.
    """
    asked = text.strip().lower()
    if asked == ALL:
        return tuple(range(depth))
    if "," in asked:
        return _listed(asked, depth)
    if "." in asked:
        return _top(_share(asked, depth), asked, depth)
    return _top(_whole(asked.removeprefix("top:"), asked, depth), asked, depth)


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


def is_full(text: str) -> bool:
    """True when the plan `text` trains the whole model."""
    return text.strip().lower() == ALL


def _top(count: int, asked: str, depth: int) -> tuple[int, ...]:
    if count > depth:
        raise ConfigError(
            f"layers.plan = {asked!r} asks for {count} blocks, the model has {depth}",
            hint=f"ask for at most {depth}",
        )
    if count < 1:
        raise ConfigError(f"layers.plan = {asked!r} trains no block of the model's {depth}", hint="ask for at least 1")
    return tuple(range(depth - count, depth))


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


def _share(asked: str, depth: int) -> int:
    try:
        share = float(asked)
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

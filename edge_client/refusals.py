"""What a site's operator is told when the coordinator turns the site away."""

from __future__ import annotations

from shared.errors import RefusedError

_HINTS = {
    "duplicate-site": "stop the other process, or give this site another name in site.toml",
    "from-the-future": "set this machine's clock",
    "membership-expired": "ask the federation's authority for a new grant, then: mailboat site accept",
    "other-config": "copy the coordinator's federation.toml here",
    "other-plan": "use the coordinator's tokenizer files and release of mailboat",
    "other-weights": "use the federation's base model and revision, or point model_dir in site.toml to it",
    "revoked": "ask the federation's authority; this site's keys no longer count",
    "unknown-site": "ask for this site's name to be added to [federation] sites",
}


def turned_away(site: str, rule: str, detail: str) -> RefusedError:
    """The error that ends a site's process, with what its operator can do about it."""
    hint = _HINTS.get(rule, "ask whoever runs the coordinator")
    return RefusedError(f"site {site} was refused: {detail}", rule=rule, hint=hint)

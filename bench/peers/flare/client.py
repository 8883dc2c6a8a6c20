"""Adds the noise of one site."""

from __future__ import annotations

import nvflare.client as flare

from bench.peers import work


def main() -> None:
    """Until the job ends."""
    flare.init()
    task = work.load()
    name = flare.get_site_name()
    site = int(name.rpartition("-")[2])
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        task.note(name, "received", round=model.current_round, ledger=task.ledger(model.params["00"]))
        delta = task.delta(site)
        trained = {key: values + delta[int(key)] for key, values in model.params.items()}
        task.note(name, "trained", round=model.current_round)
        flare.send(flare.FLModel(params=trained, meta={"NUM_STEPS_CURRENT_ROUND": 10}))


if __name__ == "__main__":
    main()

"""Adds the noise of one site."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bench.peers import work

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round at one site."""
    task = work.load()
    site = int(context.node_config["site"])
    at = int(message.content["config"]["server-round"])
    arrays = message.content["arrays"].to_numpy_ndarrays()
    task.note(f"site-{site}", "received", round=at, ledger=task.ledger(arrays[0]))
    delta = task.delta(site)
    trained = [values + delta[number] for number, values in enumerate(arrays)]
    task.note(f"site-{site}", "trained", round=at)
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": 10})})
    return Message(content=content, reply_to=message)

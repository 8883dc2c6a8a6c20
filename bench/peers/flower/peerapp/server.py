"""FedAvg with its default settings; evaluation at the sites is off, because it would send the model a second time."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from bench.peers import work

app = ServerApp()


@app.main()
def main(grid: Grid, _context: Context) -> None:
    """Run all rounds."""
    task = work.load()

    def committed(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        first = arrays[next(iter(arrays))].numpy()
        task.note("server", "committed", round=server_round, ledger=task.ledger(first))
        return MetricRecord({"done": 1})

    initial = ArrayRecord([*task.initial()])
    FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=task.rounds, evaluate_fn=committed)
    task.note("server", "finished")

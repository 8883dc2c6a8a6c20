"""Record-level differential privacy of what a site sends: DP-SGD over patients, and a ledger of what it has spent.

Abadi et al., "Deep Learning with Differential Privacy" (arXiv 1607.00133), algorithm 1. docs/privacy.md says what is
promised to whom, and what is not.

    records.py     whose windows belong together: a record is all that the notes say of one patient
    descent.py     a step: records drawn by chance, each one's gradient clipped, their sum blurred
    clipping.py    by how much one is scaled down
    ghost.py       several short records clipped in one pass
    chance.py      the chance of it, which nobody else may know
    accounting.py  what trainings cost together (Opacus)
    ledger.py      what was spent here, durably; what may still be spent
    metered.py     the trainer that the agent sees: charges the ledger before anything can be sealed

All but the last two run in the worker's process, which has torch; those run in the agent's.
"""

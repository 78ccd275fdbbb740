"What is done to the house on purpose: one-line changes, kills, foreign bytes, full disks. `nbs/tables/trust.ipynb` shows what came of it."

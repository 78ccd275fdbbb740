"What is done to the house on purpose; `nbs/tables/trust.ipynb` shows what came of it."

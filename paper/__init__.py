"""What answers "Table 4": the tables as data, the runs behind them, what they cost, and the command that makes them."""

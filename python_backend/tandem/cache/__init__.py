"""One KV cache for all models: which blocks are whose, and the allocation behind them."""

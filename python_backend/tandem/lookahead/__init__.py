"""How far to draft: costs, chances, the plan of a step, and why drafting gains little."""

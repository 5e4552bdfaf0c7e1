"""What was asked for, the sequence it becomes, and what goes back."""

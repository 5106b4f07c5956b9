"""What all methods with gates or scores share: where gates sit, what they cost, the projection onto a budget."""

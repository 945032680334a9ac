"""How far a model is from another one: texts in, distances of the probabilities of each next token out."""

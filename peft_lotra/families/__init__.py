"""c(task): the weights with which a family's core is contracted."""

"""Tools of the repository, which no wheel contains. Tests import some of them."""

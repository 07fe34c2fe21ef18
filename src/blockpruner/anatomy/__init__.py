"""Where the blocks of a model are: found, proved, sized."""

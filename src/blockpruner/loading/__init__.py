"""From a name to a model that is what it says, in memory or in its files."""

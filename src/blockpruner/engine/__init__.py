"""Losses of many masks: each shared prefix computed once, by one process or by many."""

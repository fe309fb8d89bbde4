"""Matching-pursuit sparse autoencoders at about the price of TopK."""

"""Output for people: pictures, curves, galleries."""

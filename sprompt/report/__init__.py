"""What people look at: pictures, curves, galleries."""

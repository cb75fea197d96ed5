"""Low-data studies: many pre-trainings and fine-tunings that differ in one thing, and what they show."""

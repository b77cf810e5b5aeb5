"""What a run says about itself: a page made of its records alone."""

"""What is measured of a trained model, the same for every objective."""

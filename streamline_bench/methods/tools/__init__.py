"""What several methods share: ranking layers, removing them, running part of a model."""

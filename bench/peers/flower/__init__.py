"""The app that Flower runs, in an environment of its own."""

"""The embedded pair `demo:base` and `demo:aligned`, its data and the recipe that made it."""

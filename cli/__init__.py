"""The `surgery` command (installed as `surgery.cli`); no arithmetic and no defaults live here."""

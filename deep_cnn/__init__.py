"""The command line of recode-perceptions' deep_cnn, spoken by Marten; see `python -m deep_cnn --help`."""

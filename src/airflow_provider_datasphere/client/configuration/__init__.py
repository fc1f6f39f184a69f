"""The configuration of a new job: config.yaml, or a mapping with its keys, checked as a whole.

Reads local files that the configuration names; knows neither Airflow nor the service.
"""

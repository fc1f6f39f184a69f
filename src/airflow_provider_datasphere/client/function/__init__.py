"""A Python function as the program of a job: its source, its arguments and its result. Knows no Airflow."""

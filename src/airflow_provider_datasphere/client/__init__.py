"""All that speaks to DataSphere. Imports no Airflow: usable from a plain script."""

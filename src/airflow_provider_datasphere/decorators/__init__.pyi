from airflow.sdk.definitions.decorators import TaskDecoratorCollection

from airflow_provider_datasphere.decorators.datasphere import datasphere_task

class _Tasks(TaskDecoratorCollection):
    datasphere = staticmethod(datasphere_task)

task: _Tasks

class DagResult: pass
def run_dags(): pass

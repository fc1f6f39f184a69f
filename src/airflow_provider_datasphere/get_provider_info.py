"""The provider's metadata, which every component of Airflow reads when it starts: imports nothing else.

The one home of the connection form: Airflow 3.2+ reads it from the metadata, and the hook creates the widgets of older
versions from it.
"""

from airflow_provider_datasphere import __version__

_TEXT = {"type": ["string", "null"]}
_SECRET = {"type": ["string", "null"], "format": "password"}
_FLAG = {"type": ["boolean", "null"], "default": False}

CONNECTION_FIELDS = {
    "project_id": {
        "label": "Project ID",
        "description": "ID of the default DataSphere project, such as bt1…; it is in the address of the project's "
        "page. Test Connection checks the access to it.",
        "schema": _TEXT,
    },
    "service_account_json": {
        "label": "Service account key (JSON)",
        "description": "The authorized key of a service account that is a Developer of the project: the whole text of "
        "the file made by: yc iam key create --service-account-name NAME --output key.json. On a VM or Managed Airflow "
        "cluster with a service account leave all credentials empty: then its metadata service is used.",
        "schema": _SECRET,
    },
    "service_account_json_path": {
        "label": "Service account key file",
        "description": "Path of the same JSON in a file, which must exist on every worker and triggerer. "
        "Fill in one credential at most.",
        "schema": _TEXT,
    },
    "iam_token": {
        "label": "IAM token",
        "description": "A ready IAM token, as printed by: yc iam create-token. It isn't refreshed and lives 12 hours "
        "at most: for experiments only.",
        "schema": _SECRET,
    },
    "oauth": {
        "label": "OAuth token (deprecated)",
        "description": "OAuth token (y0_…) of a Yandex account. Yandex Cloud is withdrawing OAuth: use a service "
        "account.",
        "schema": _SECRET,
    },
    "impersonate_service_account_id": {
        "label": "Impersonate service account",
        "description": "ID of a service account to impersonate, with any credential. The credential's account needs "
        "the role iam.serviceAccounts.tokenCreator on it.",
        "schema": _TEXT,
    },
    "endpoint": {
        "label": "DataSphere endpoint",
        "description": "host:port of the DataSphere API. Default: datasphere.api.cloud.yandex.net:443.",
        "schema": _TEXT,
    },
    "operation_endpoint": {
        "label": "Operation endpoint",
        "description": "host:port of the operation API. Default: operation.api.cloud.yandex.net:443, or the DataSphere "
        "endpoint if that is outside *.cloud.yandex.net.",
        "schema": _TEXT,
    },
    "iam_endpoint": {
        "label": "IAM endpoint",
        "description": "host:port of the IAM API. Default: iam.api.cloud.yandex.net:443, or the DataSphere endpoint if "
        "that is outside *.cloud.yandex.net.",
        "schema": _TEXT,
    },
    "ui_endpoint": {
        "label": "UI address",
        "description": "Base URL of links to jobs. Default: https://datasphere.yandex.cloud.",
        "schema": _TEXT,
    },
    "root_certificates": {
        "label": "Root certificates file",
        "description": "Path of a PEM file with the certificate authorities to trust instead of the public ones, "
        "on every worker and triggerer.",
        "schema": _TEXT,
    },
    "insecure": {
        "label": "No TLS",
        "description": "For a service on this machine (localhost) only, such as the emulator.",
        "schema": _FLAG,
    },
}

HIDDEN_FIELDS = ["host", "schema", "login", "password", "port", "extra"]

PLACEHOLDERS = {
    "project_id": "bt1…",
    "service_account_json": '{"id": "aje…", "service_account_id": "aje…", "private_key": "…"}',
    "service_account_json_path": "/opt/airflow/key.json",
    "iam_token": "t1.…",
    "oauth": "y0_…",
    "impersonate_service_account_id": "aje…",
    "endpoint": "datasphere.api.cloud.yandex.net:443",
    "operation_endpoint": "operation.api.cloud.yandex.net:443",
    "iam_endpoint": "iam.api.cloud.yandex.net:443",
    "ui_endpoint": "https://datasphere.yandex.cloud",
    "root_certificates": "/etc/ssl/certs/my-root.pem",
}

_INTEGRATION = "Yandex Cloud DataSphere Jobs"
_PACKAGE = "airflow_provider_datasphere"


def get_provider_info():  # type: ignore[no-untyped-def]  # typing would be an import
    """Return what this provider offers, in the terms of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-provider-datasphere",
        "name": _INTEGRATION,
        "description": "Fork and make Yandex Cloud DataSphere jobs, watch them and collect their results.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": _INTEGRATION,
                "external-doc-url": "https://yandex.cloud/en/docs/datasphere/concepts/jobs/",
                "logo": "https://raw.githubusercontent.com/airflow-provider-datasphere/airflow-provider-datasphere/main/"
                "docs/images/logo.svg",
                "tags": ["service"],
            }
        ],
        "operators": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    f"{_PACKAGE}.operators.jobs",
                    f"{_PACKAGE}.operators.new_job",
                    f"{_PACKAGE}.operators.function",
                    f"{_PACKAGE}.operators.cancel",
                    f"{_PACKAGE}.operators.results",
                ],
            }
        ],
        "sensors": [{"integration-name": _INTEGRATION, "python-modules": [f"{_PACKAGE}.sensors.jobs"]}],
        "hooks": [{"integration-name": _INTEGRATION, "python-modules": [f"{_PACKAGE}.hooks.datasphere"]}],
        "triggers": [{"integration-name": _INTEGRATION, "python-modules": [f"{_PACKAGE}.triggers.jobs"]}],
        "task-decorators": [
            {"name": "datasphere", "class-name": f"{_PACKAGE}.decorators.datasphere.datasphere_task"},
        ],
        "filesystems": [f"{_PACKAGE}.filesystems.datasphere"],
        "connection-types": [
            {
                "connection-type": "datasphere",
                "hook-class-name": f"{_PACKAGE}.hooks.datasphere.DataSphereHook",
                "hook-name": "Yandex DataSphere",
                "ui-field-behaviour": {
                    "hidden-fields": HIDDEN_FIELDS,
                    "relabeling": {},
                    "placeholders": PLACEHOLDERS,
                },
                "conn-fields": CONNECTION_FIELDS,
            }
        ],
        "extra-links": [f"{_PACKAGE}.links.jobs.DataSphereJobLink"],
    }

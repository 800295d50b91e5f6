#!/bin/sh
# The rules beside this as PrometheusRule objects, for the Prometheus operator; a test holds the copy to them:
#   deploy/prometheus/prometheusrule.sh > deploy/kubernetes/components/monitoring/prometheusrule.yaml
set -eu
cd "$(dirname "$0")/rules"
echo "# Written by deploy/prometheus/prometheusrule.sh from deploy/prometheus/rules: change those, and run it again."
for file in *.yml; do
    printf -- '---\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n'
    printf 'metadata:\n  name: ddetr-%s\n  namespace: ddetr\n  labels:\n    app.kubernetes.io/name: ddetr\nspec:\n' "${file%.yml}"
    sed 's/^\(.\)/  \1/' "$file"
done

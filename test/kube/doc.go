// Package kube runs a real Kubernetes API: kube-apiserver and etcd, built by
// tools.sh, in a directory of their own on the loopback. There is no kubelet, no
// controller and no scheduler. A test binds its pods to nodes itself and says
// that they run, or has kwok say so for many.
package kube

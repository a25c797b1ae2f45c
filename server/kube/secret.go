package kube

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// caKey is the key of the authorities, beside those of type kubernetes.io/tls.
const caKey = "ca.crt"

// TLSSecret is what a Secret has under the keys of type kubernetes.io/tls, in PEM.
// It is never logged.
type TLSSecret struct {
	Chain, Key, Roots []byte

	held *corev1.Secret // as it was read
}

// TLSSecret reads a Secret. One that is not there is an error, with reason
// kubernetes_secret_missing: a right to make Secrets can't be one to a name, and
// would be worth any ServiceAccount of the namespace.
func (c *Clusters) TLSSecret(ctx context.Context, cluster, namespace, name string) (TLSSecret, error) {
	cl := c.byName[cluster]
	if cl == nil {
		return TLSSecret{}, errNoCluster
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	held := &corev1.Secret{}
	err := cl.api.core.Get().Namespace(namespace).Resource("secrets").Name(name).Do(ctx).Into(held)
	switch {
	case apierrors.IsNotFound(err):
		return TLSSecret{}, secretMissing(namespace, name)
	case err != nil:
		return TLSSecret{}, cl.api.unavailable(err, "get secrets "+name)
	}
	return TLSSecret{Chain: held.Data[corev1.TLSCertKey], Key: held.Data[corev1.TLSPrivateKeyKey], Roots: held.Data[caKey], held: held}, nil
}

// keepPolicy is the annotation by which helm leaves alone what a release has no
// more. A Secret that was made anew by hand has none: the next upgrade would take
// istiod's certificate away.
const keepPolicy = "helm.sh/resource-policy"

// PutTLSSecret makes a Secret hold what is given, where TLSSecret has read was: one
// that was changed since is left alone, with reason kubernetes_conflict, and one
// that is gone is not made. Whatever else it holds stays.
func (c *Clusters) PutTLSSecret(ctx context.Context, cluster, namespace, name string, was, will TLSSecret) error {
	cl := c.byName[cluster]
	if cl == nil {
		return errNoCluster
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	changed := was.held.DeepCopy()
	if changed.Type != corev1.SecretTypeOpaque && changed.Type != corev1.SecretTypeTLS {
		return fault.New(fault.NotReady, "kubernetes_secret_type", "the Secret "+name+" has another type than Opaque or kubernetes.io/tls, which can't be changed: delete it, and make it anew")
	}
	if changed.Annotations == nil {
		changed.Annotations = map[string]string{}
	}
	changed.Annotations[keepPolicy] = "keep"
	if changed.Data == nil {
		changed.Data = map[string][]byte{}
	}
	changed.Data[corev1.TLSCertKey], changed.Data[corev1.TLSPrivateKeyKey], changed.Data[caKey] = will.Chain, will.Key, will.Roots
	err := cl.api.core.Put().Namespace(namespace).Resource("secrets").Name(name).Body(changed).Do(ctx).Error()
	switch {
	case apierrors.IsNotFound(err):
		return secretMissing(namespace, name)
	case apierrors.IsConflict(err):
		return fault.Wrap(fault.Conflict, err, "kubernetes_conflict", "somebody else changed the Secret "+name+" at the same time: it is tried again")
	case apierrors.IsInvalid(err):
		// Not with its cause, which may quote what was sent.
		return fault.New(fault.NotReady, "kubernetes_secret_refused", "the API server does not take the Secret "+name+": if it is immutable, delete it, and make it anew")
	case err != nil:
		// Likewise: a webhook that denies it may quote it.
		return cl.api.unavailable(&apierrors.StatusError{ErrStatus: metav1.Status{Reason: apierrors.ReasonForError(err), Message: "the API server answers " + string(apierrors.ReasonForError(err))}}, "update secrets "+name)
	}
	return nil
}

func secretMissing(namespace, name string) error {
	return fault.New(fault.NotReady, "kubernetes_secret_missing",
		"there is no Secret "+namespace+"/"+name+", and the server makes none: kubectl -n "+namespace+" create secret generic "+name)
}

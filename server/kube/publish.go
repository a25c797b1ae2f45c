package kube

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

// Roots returns the trust bundle, as PEM, and a channel that is closed when
// another one has taken its place.
type Roots func() (pem []byte, replaced <-chan struct{})

const (
	// bundleKey is the key of the trust bundle in its ConfigMap.
	bundleKey = "bundle.crt"
	// publishAgain is how often the ConfigMap is looked at: somebody may have
	// changed or deleted it.
	publishAgain = time.Minute
)

// publisher keeps the trust bundle in a ConfigMap of a cluster, for agents that
// come there for the first time.
type publisher struct {
	cluster, namespace, name string

	api     *api
	current atomic.Bool // by the last look
}

func newPublisher(cluster, configMap string, a *api) *publisher {
	namespace, name, _ := strings.Cut(configMap, "/")
	return &publisher{cluster: cluster, namespace: namespace, name: name, api: a}
}

// run publishes until ctx ends.
func (p *publisher) run(ctx context.Context, roots Roots, log *slog.Logger) {
	log = log.With(slog.String("cluster", p.cluster), slog.String("config_map", p.namespace+"/"+p.name))
	wait := schedule.Backoff{Min: time.Second, Max: publishAgain}
	for {
		bundle, replaced := roots()
		changed, err := p.publish(ctx, string(bundle))
		if ctx.Err() != nil {
			return
		}
		p.current.Store(err == nil)
		pause := publishAgain
		switch {
		case err != nil:
			pause = wait.Next()
			log.LogAttrs(ctx, slog.LevelWarn, "the trust bundle can't be published: new agents may not recognise the server", slog.String("error", err.Error()))
		case changed:
			log.InfoContext(ctx, "the trust bundle is published")
		}
		if err == nil {
			wait.Reset()
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-replaced:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// publish makes the ConfigMap hold the bundle, and says whether it did not
// before. Whatever else it holds stays.
func (p *publisher) publish(ctx context.Context, bundle string) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	held := &corev1.ConfigMap{}
	err = p.api.core.Get().Namespace(p.namespace).Resource("configmaps").Name(p.name).Do(ctx).Into(held)
	missing := apierrors.IsNotFound(err)
	switch {
	case err != nil && !missing:
		return false, p.api.unavailable(err, "get the ConfigMap "+p.name)
	case err == nil && held.Data[bundleKey] == bundle:
		return false, nil
	case missing:
		held = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.name}}
	}
	if held.Data == nil {
		held.Data = map[string]string{}
	}
	held.Data[bundleKey] = bundle
	if missing {
		err = p.api.core.Post().Namespace(p.namespace).Resource("configmaps").Body(held).Do(ctx).Error()
	} else {
		err = p.api.core.Put().Namespace(p.namespace).Resource("configmaps").Name(p.name).Body(held).Do(ctx).Error()
	}
	switch {
	case apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err):
		return false, fault.Wrap(fault.Conflict, err, "kubernetes_conflict", "somebody else changed the ConfigMap "+p.name+" at the same time: it is tried again")
	case err != nil && missing:
		return false, p.api.unavailable(err, "create the ConfigMap "+p.name+", which is not there")
	case err != nil:
		return false, p.api.unavailable(err, "update the ConfigMap "+p.name)
	}
	return true, nil
}

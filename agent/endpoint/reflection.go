package endpoint

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
)

// Reflection is there because clients that find none assume that the endpoint
// has the Workload API only (WL-16). Its streams count like all others.

type reflectV1 struct {
	reflectionv1.ServerReflectionServer
	server *Server
}

func (r reflectV1) ServerReflectionInfo(stream reflectionv1.ServerReflection_ServerReflectionInfoServer) error {
	return r.server.counted(stream.Context(), func(*caller) error {
		return r.ServerReflectionServer.ServerReflectionInfo(stream)
	})
}

type reflectV1Alpha struct {
	reflectionv1alpha.ServerReflectionServer
	server *Server
}

func (r reflectV1Alpha) ServerReflectionInfo(stream reflectionv1alpha.ServerReflection_ServerReflectionInfoServer) error {
	return r.server.counted(stream.Context(), func(*caller) error {
		return r.ServerReflectionServer.ServerReflectionInfo(stream)
	})
}

func (s *Server) registerReflection(at *grpc.Server) {
	opts := reflection.ServerOptions{Services: at}
	reflectionv1.RegisterServerReflectionServer(at, reflectV1{reflection.NewServerV1(opts), s})
	reflectionv1alpha.RegisterServerReflectionServer(at, reflectV1Alpha{reflection.NewServer(opts), s})
}
